"""Everything that this project uses of its libraries without their promise that it stays: one row a name.

A row says where the name is used, why, and what breaks without it, so that after a version bump the failures here name
every place to look at. A row without a check is a path that must exist, with the parameters that are called or
overridden. `python -m pytest tests/test_private_apis.py -m "slow or not slow"` adds DeepSpeed's engines.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import private_api_checks as checks
import pytest
import torch
from torch import nn

from child_processes import process_pool
from memory.launch import launched
from memory.strategy import Strategy
from utils import quiet_libraries


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Api:
    """`name`, below `library`, is imported unless there is a `check`. `stages`: of ZeRO; there `name` starts at the
    engine or at one of its parameters. `words`: what the files call it, by default the name's last part."""

    library: str
    name: str
    files: str
    why: str
    breaks: str
    signature: str | None = None
    check: Callable[[], None] | None = None
    stages: tuple[int, ...] = ()
    words: str = ""

    def explain(self, problem: object) -> str:
        try:
            installed = version(self.library)
        except PackageNotFoundError:
            installed = "of Python's" if find_spec(self.library) else "not installed"
        return (
            f"{self.library} {installed}: {self.name}: {problem}\n"
            f"  used in {self.files}: {self.why}\n  what breaks: {self.breaks}"
        )

    @property
    def used_words(self) -> list[str]:
        return (self.words or self.name.rpartition(".")[2]).split()


NO_PREDICTION = "predictions fail"
WRONG_PREDICTION = "predictions are silently wrong"

APIS = [
    # In every training run: models
    Api("transformers", "modeling_layers.GradientCheckpointingLayer", "layers/tiled_mlp.py",
        "finds the layers that may be checkpointed", "no MLP is tiled or recomputed: silently more memory"),
    Api("transformers", "GradientCheckpointingLayer.mlp, .gradient_checkpointing", "layers/tiled_mlp.py",
        "tells which layers are checkpointed, and where their MLP is",
        "no MLP is tiled or recomputed: silently more memory", check=checks.check_checkpointing_flags,
        words="mlp gradient_checkpointing"),
    Api("transformers", "PreTrainedModel._gradient_checkpointing_func", "mgm/patch_info_mining.py",
        "set on every module with the attribute gradient_checkpointing",
        "mining is not checkpointed: silently more memory", check=checks.check_checkpointing_flags,
        words="gradient_checkpointing _gradient_checkpointing_func"),
    Api("transformers", "GradientCheckpointingLayer._gradient_checkpointing_func", "layers/checkpoint.py",
        "a layer calls it with its forward and its arguments", "layers are checkpointed by torch: slower",
        check=checks.check_checkpointing_function, words="_gradient_checkpointing_func"),
    Api("torch", "utils.checkpoint.get_device_states, .set_device_states", "layers/checkpoint.py",
        "keep the state of a GPU's random numbers", "no training run starts", check=checks.check_device_states,
        words="get_device_states set_device_states"),
    Api("transformers", "PreTrainedModel.activation_checkpointing_enable",
        "models/checkpointing.py",
        "checkpoints layers", "training does not start",
        signature="self, activation_checkpointing_kwargs, every_n_layers, offload"),
    Api("transformers", "PreTrainedModel.disable_input_require_grads", "models/checkpointing.py",
        "removes the hooks by which transformers and PEFT let embeddings need a gradient",
        "a frozen tower's backward pass runs for nothing", check=checks.check_input_gradients,
        words="disable_input_require_grads"),
    Api("transformers", "PreTrainedModel.loss_function", "layers/model_loss.py",
        "the loss is put in its place while a forward runs", "every training run ends in its first step",
        check=checks.check_loss_function, words="loss_function"),
    Api("transformers", "loss.loss_utils.ForCausalLMLoss", "layers/model_loss.py",
        "the one loss that is computed by chunks", "nothing can be imported"),
    Api("torch", "_C._accelerator_setAllocatorSettings", "utils.py",
        "gives the allocator its settings after the import, which has read the environment", "no script starts"),
    Api("atexit", "_run_exitfuncs", "utils.py",
        "a launched process runs them and then ends without ending the interpreter", "runs on several GPUs end badly"),
    Api("torch", "Tensor._version", "layers/model_loss.py",
        "counts the changes in place: whether a model has added to its loss",
        "what a router adds to the loss is not weighed by tokens", check=checks.check_version, words="_version"),
    Api("torch", "nn.Module._forward_hooks, ._forward_pre_hooks", "layers/frozen_linear.py",
        "whether hooks wait for a layer's call: then it is called", "hooks of frozen layers do not run",
        check=checks.check_hook_tables, words="_forward_hooks _forward_pre_hooks"),
    Api("torch", "nn.Module.__getattr__", "layers/model_loss.py",
        "an attribute of the object is found before a module of that name", "the logits are made",
        check=checks.check_attribute_before_module, words="vars(owner)[name]"),
    Api("accelerate", "utils.extract_model_from_parallel", "layers/model_loss.py",
        "takes a forward apart down to the function that wraps no other", "the loss falls back to the model's own",
        check=checks.check_unwrapping, words="__wrapped__"),
    *[
        Api("transformers", f"{name}", "models/lora.py layers/tiled_mlp.py" if "Conv1D" in name else "models/lora.py",
            "a linear layer that is no torch.nn.Linear", "nothing can be imported")
        for name in ("pytorch_utils.Conv1D", "models.falcon.modeling_falcon.FalconLinear")
    ],
    *[
        Api("transformers", f"PreTrainedModel.{name}", "models/parts.py", "finds a model's parts", "no model is built",
            check=checks.check_parts, words=name)
        for name in ("get_decoder", "get_encoder")
    ],
    Api("transformers", "CLIPVisionModel.pre_layrnorm, .embeddings, .encoder.layers, .post_layernorm",
        "mgm/modeling_mgm.py", "runs CLIP up to the layer with the features and no further",
        "features of another layer", check=checks.check_clip,
        words="pre_layrnorm embeddings encoder layers post_layernorm"),
    Api("transformers", "models.clip.modeling_clip.CLIPEncoderLayer.forward", "mgm/modeling_mgm.py",
        "is called layer by layer", "training does not start", signature="self, hidden_states, attention_mask, kwargs",
        words="layer attention_mask"),
    Api("transformers", "ConvNextModel.layernorm, and eps of its other norms", "mgm/modeling_mgm.py",
        "the classifier's norm is left out; the config's eps is set, which ConvNeXt's own code ignores",
        "silently other features", check=checks.check_convnext, words="layernorm LayerNorm eps"),
    Api("transformers", "models.convnext.modeling_convnext.ConvNextStage.forward", "mgm/modeling_mgm.py",
        "is called stage by stage", "training does not start", signature="self, features", words="stages stage"),
    Api("transformers", "GemmaTextScaledWordEmbedding.embed_scale", "mgm/modeling_mgm.py",
        "Gemma scales embeddings inside the module: image features need the same factor",
        "image features are silently smaller by sqrt(hidden_size)", check=checks.check_embed_scale,
        words="embed_scale"),
    Api("transformers", "GenerationMixin._expand_inputs_for_generation", "mgm/modeling_mgm.py",
        "overridden: a beam needs all images of its row", "with beams, silently the images of other rows",
        signature="self, expand_size, is_encoder_decoder, input_ids, model_kwargs"),
    *[
        Api("transformers", f"PreTrainedModel.{name}", "mgm/modeling_mgm.py", why, breaks)
        for name, why, breaks in (
            ("_supports_sdpa", "MGM declares the attention of its parts", "--attn_implementation sdpa is refused"),
            ("_supports_flash_attn", "the same", "--attn_implementation flash_attention_2 is refused"),
            ("_supports_attention_backend", "the same", "attention registered by a user is refused"),
            ("_skip_keys_device_placement", "the cache stays on its devices", "device_map makes copies of the cache"),
        )
    ],
    Api("transformers", "PreTrainedModel._tied_weights_keys", "mgm/modeling_mgm.py",
        "ties the head to the embedding", "the head is silently a second, random weight", check=checks.check_tied_head,
        words="_tied_weights_keys"),
    Api("transformers", "PreTrainedModel._init_weights", "conversion/parts.py", "draws a new projector and mining",
        "--assemble fails", signature="self, module"),
    Api("transformers", "modeling_utils.slice_logits_to_keep", "mgm/modeling_mgm.py", "computes the logits asked for",
        "nothing can be imported", signature="hidden_states, logits_to_keep"),
    Api("transformers", "modeling_utils.set_quantized_state", "models/loading.py",
        "keeps ZeRO-3 from splitting weights that are quantized first", "nothing can be imported", signature=""),
    Api("transformers", "integrations.deepspeed.is_deepspeed_zero3_enabled", "mgm/modeling_mgm.py",
        "whether all processes must run the vision side", "nothing can be imported", signature=""),
    Api("transformers", "utils.chat_template_utils.render_jinja_template", "chat/render.py",
        "renders conversations and returns the spans of the replies", "nothing can be imported",
        signature="conversations, tools, documents, chat_template, return_assistant_tokens_mask, "
        "continue_final_message, add_generation_prompt, kwargs"),
    Api("transformers", "LlavaProcessor._get_num_multimodal_tokens", "chat/image_text.py mgm/processing_mgm.py",
        "tells the tokens of an image from its size", "every size is tried with an image, which takes long",
        signature="self, image_sizes, kwargs"),
    Api("transformers", "what a processor hands to its tokenizer", "chat/expansion.py",
        "is the text with its images' tokens: replies are looked up there", "labels cannot be made",
        check=checks.check_processor_calls_its_tokenizer, words="WatchedTokenizer"),
    Api("transformers", "ProcessorMixin.image_token_ids", "chat/arguments.py",
        "says which tokens stand for an image", "the largest batch cannot be made"),
    Api("transformers", "configuration_utils.SubConfigSpec", "mgm/configuration_mgm.py", "declares MGM's three parts",
        "nothing can be imported", signature="config_class, model_type, init_kwargs, optional"),
    Api("transformers", "PreTrainedConfig.sub_configs_defaults", "mgm/configuration_mgm.py", "the same",
        "parts stay dicts"),
    Api("transformers", "utils.PROCESSOR_NAME", "models/adapter.py", "whether a folder holds a processor",
        "nothing can be imported"),
    Api("transformers", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "models/loading.py",
        "whether a model has a vision side", "nothing can be imported"),
    *[
        Api("transformers", f"models.auto.{module}.{name}", "models/processors.py",
            "reads a folder's settings, nested or in a file of their own", "nothing can be imported")
        for module, name in (
            ("tokenization_auto", "get_tokenizer_config"), ("image_processing_auto", "get_image_processor_config"),
            ("video_processing_auto", "get_video_processor_config"),
            ("feature_extraction_auto", "get_feature_extractor_config"),
        )
    ],
    Api("transformers", "models.auto.processing_auto.processor_class_from_name", "models/processors.py",
        "finds MGM's processor too", "nothing can be imported", signature="class_name"),
    Api("transformers", "ProcessorMixin.get_attributes", "models/processors.py", "the parts of a processor",
        "no processor is loaded", signature=""),
    Api("transformers", "ProcessorMixin.get_processor_dict", "models/processors.py", "its settings",
        "no processor is loaded", signature="pretrained_model_name_or_path, kwargs"),
    Api("transformers", "ProcessorMixin.from_args_and_dict", "models/processors.py", "puts it together",
        "no processor is loaded", signature="args, processor_dict, kwargs"),
    Api("transformers", "ProcessorMixin.check_argument_for_proper_class, by the name VideoProcessorMixin",
        "models/processors.py", "finds the class of VideoSettings without torchvision",
        "without torchvision most vision-language models cannot be loaded", check=checks.check_video_settings,
        words="VideoProcessorMixin"),
    Api("transformers", "models.pixtral.image_processing_pil_pixtral.get_resize_output_image_size",
        "models/processors.py", "stands for the same function of the file that needs torchvision",
        "silently another number of image tokens", check=checks.check_pixtral_resize,
        words="image_processing_pil_pixtral image_processing_pixtral"),
    Api("transformers", "models.smolvlm.processing_smolvlm.num2words", "models/processors.py",
        "is read for videos alone", "SmolVLM needs num2words"),
    Api("transformers", "PreTrainedConfig._name_or_path", "conversion/original_config.py",
        "a key of config.json that tells where a model came from", "the way back keeps a superfluous key",
        check=checks.check_name_or_path, words="_name_or_path"),
    Api("huggingface_hub", "dataclasses.strict", "mgm/configuration_mgm.py", "makes MGMConfig a checked dataclass",
        "nothing can be imported", signature="cls, accept_kwargs"),
    # In every training run: adapters and 4 bits
    Api("peft", "names of parameters", "memory/predict.py models/lora.py models/gather.py",
        "tells a module's path, and what belongs to an adapter, by modules_to_save.default",
        "wrong names in reports; an adapter without its full modules", check=checks.check_peft_paths,
        words="modules_to_save"),
    Api("peft", "utils.ModulesToSaveWrapper", "models/lora.py",
        "its original_module is frozen and counts as no parameter", "wrong counts of parameters",
        signature="module_to_save, adapter_name, tied_module"),
    Api("peft", "utils.transformers_weight_conversion.convert_peft_config_for_transformers", "models/lora.py",
        "shows which names PEFT takes for the experts'", "nothing can be imported",
        signature="peft_config, model, conversions"),
    Api("peft", "set_peft_model_state_dict", "models/adapter.py", "returns what is missing and unexpected",
        "an incomplete adapter is loaded",
        signature="model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage"),
    Api("peft", "get_peft_model, which asks for is_loaded_in_4bit", "layers/quantization.py",
        "chooses LoRA for 4-bit layers", "an adapter of a quantized preset cannot be merged",
        check=checks.check_peft_asks_for_4_bits, words="is_loaded_in_4bit"),
    Api("bitsandbytes", "functional.quantize_4bit", "layers/quantization.py", "packs weights",
        "--quantize nf4 fails", signature="A, absmax, out, blocksize, compress_statistics, quant_type, quant_storage"),
    Api("bitsandbytes", "functional.dequantize_4bit", "layers/quantization.py", "unpacks weights",
        "DoRA's predictions fail", signature="A, quant_state, absmax, out, blocksize, quant_type"),
    Api("bitsandbytes", "functional.create_dynamic_map", "layers/quantization.py", "makes the scales' table",
        "--quantize nf4 fails", signature="signed, max_exponent_bits, total_bits"),
    Api("bitsandbytes", "functional.name2qmap", "layers/quantization.py",
        "its key `dynamic` is set in advance: it is computed from data, which meta tensors lack",
        "a prediction with --quantize nf4 fails", check=checks.check_dynamic_map, words="name2qmap dynamic"),
    Api("bitsandbytes", "functional.QuantState", "layers/quantization.py memory/trace.py",
        "its tensors are listed and replaced by vars()", "scales are missing from predictions, or are not moved",
        check=checks.check_quant_state, words="quant_state"),
    Api("bitsandbytes", "nn.Params4bit.__new__", "layers/quantization.py", "makes a weight that is packed already",
        "--quantize nf4 fails",
        signature="cls, data, requires_grad, quant_state, blocksize, compress_statistics, quant_type, quant_storage, "
        "module, bnb_quantized, kwargs", words="Params4bit bnb_quantized"),
    Api("bitsandbytes", "nn.Linear4bit", "layers/quantization.py", "a 4-bit layer", "--quantize nf4 fails",
        signature="input_features, output_features, bias, compute_dtype, compress_statistics, quant_type, "
        "quant_storage, device"),
    Api("bitsandbytes", "nn.Linear4bit.support_avx512bf16_for_cpu", "layers/quantization.py",
        "keeps an evaluation on a CPU from repacking the weights",
        "training on a CPU fails after an evaluation", check=checks.check_quant_state,
        words="support_avx512bf16_for_cpu"),
    Api("transformers", "BitsAndBytesConfig.llm_int8_skip_modules", "layers/quantization.py",
        "a pattern of what stays unquantized, in 4 bits too", "the towers are quantized",
        check=checks.check_skip_modules,
        words="llm_int8_skip_modules"),
    # In every training run: the loop, data, messages
    Api("accelerate", "launcher's environment", "step.py memory/launch.py training/forecast.py",
        "ACCELERATE_* variables start DeepSpeed", "DeepSpeed is silently not used",
        check=checks.check_launch_variables,
        words="ACCELERATE_"),
    Api("accelerate", "launcher's environment for FSDP", "models/fsdp2.py",
        "ACCELERATE_USE_FSDP and FSDP_* start FSDP2; each AcceleratorState copies PartialState's distributed_type",
        "FSDP2 is silently not used, on a CPU or everywhere",
        check=checks.check_fsdp_variables,
        words="ACCELERATE_USE_FSDP PartialState"),
    Api("torch", "distributed.fsdp: hooks behind a split gradient", "training/gradients.py",
        "a parameter's post_accumulate_grad hooks run once its part of the gradient is there",
        "a rehearsal under FSDP2 says that no gradient reaches what is trained",
        check=checks.check_fsdp_hooks,
        words="register_post_accumulate_grad_hook"),
    Api("torch", "launcher's environment", "training/doctor_machines.py",
        "says that the launcher has opened the store at MASTER_PORT", "--doctor opens a second one: the port is taken",
        check=checks.check_agent_store_variable, words="TORCHELASTIC_USE_AGENT_STORE"),
    Api("accelerate", "commands.launch.main", "training/faults.py", "its module's name tells a launcher's process",
        "a run outlives its launcher", words="LAUNCHERS"),
    Api("torch", "distributed.run.main", "training/faults.py", "the same", "a run outlives its launcher",
        words="LAUNCHERS"),
    Api("accelerate", "utils.deepspeed.DeepSpeedEngineWrapper.backward", "training/rehearsal.py",
        "runs the engine's step only with sync_gradients", "a rehearsal changes what is trained",
        signature="self, loss, sync_gradients, kwargs", words="sync_gradients"),
    Api("accelerate", "utils.memory.clear_device_cache", "train.py memory/probed_step.py",
        "frees what loading and answering leave", "nothing can be imported", signature="garbage_collection"),
    Api("accelerate", "data_loader.BatchSamplerShard", "data/batching.py",
        "reads batch_size and drop_last, and deals micro-batches out in turn",
        "processes silently see other samples", check=checks.check_batch_sampler, words="batch_size drop_last"),
    Api("torch", "utils.data.Dataset.__getitems__", "data/skipping.py",
        "is given the sampler's own list, with what it carries", "--on_bad_sample skip fails",
        check=checks.check_getitems,
        words="__getitems__"),
    Api("torch", "_utils.ExceptionWrapper", "utils.py", "a worker's exception comes with its traceback as message",
        "a UserError is not one line", check=checks.check_worker_exception, words="UserError"),
    Api("torch", "message and SIGCHLD handler for a dead worker", "training/faults.py",
        "tells which worker died and of what", "the run ends with a traceback", check=checks.check_dead_worker,
        words="SIGCHLD"),
    Api("torch", "message of an allocation that fails on a CPU", "training/out_of_memory.py",
        "tells an out-of-memory error from others", "it is not explained", check=checks.check_host_out_of_memory,
        words="DefaultCPUAllocator"),
    Api("torch", "OutOfMemoryError", "training/out_of_memory.py memory/measure_gpu.py", "the same on a GPU",
        "it is not explained"),
    *[
        Api("torch", f"cuda.memory.{name}", files, "notes who allocates what", "no snapshot is written",
            signature=signature)
        for name, files, signature in (
            ("_record_memory_history", "training/rehearsal.py benchmarks/gpu_matrix.py",
             "enabled, context, stacks, max_entries, device, clear_history, compile_context, "
             "global_record_annotations, skip_actions"),
            ("_dump_snapshot", "training/out_of_memory.py", "filename, augment_with_fx_traces"),
            ("_snapshot", "benchmarks/gpu_matrix.py", "device, augment_with_fx_traces"),
        )
    ],
    Api("torch", "optim.AdamW's state and its key foreach", "training/training_state.py memory/kernels.py",
        "state is written by hand; a prediction chooses the CUDA form",
        "a resumed run begins without moments; wrong predictions", check=checks.check_optimizer_state,
        words="optimizer"),
    Api("tensorboard", "compat", "training/run_log.py", "torch's SummaryWriter needs it", "training does not start",
        words="SummaryWriter"),
    Api("torch", "utils.tensorboard.SummaryWriter.add_hparams", "training/run_log.py",
        "writes into the run's own folder by run_name", "a run ends with a traceback",
        signature="self, hparam_dict, metric_dict, hparam_domain_discrete, run_name, global_step"),
    Api("datasets", "Dataset._fingerprint", "data/lengths.py data/sizes.py data/sources.py",
        "names what a cache was made of",
        "lengths are measured again, or those of other data are taken", check=checks.check_fingerprint,
        words="_fingerprint"),
    Api("datasets", "fingerprint.Hasher.hash", "data/lengths.py data/sizes.py", "the same",
        "lengths are measured in every run",
        signature="value", words="Hasher"),
    Api("bitsandbytes", "backends.cpu.ops.logger", "quiet.py", "a warning that helps no user is left out",
        "users see it", words="logging"),
    Api("torch", "KINETO_LOG_LEVEL", "memory/cpu_profile.py benchmarks/step_watch.py",
        "keeps the profiler from announcing itself", "two lines more on stderr", check=checks.check_kineto_variable,
        words="KINETO_LOG_LEVEL"),
    Api("torch", "_C._profiler._EventType", "memory/cpu_profile.py",
        "finds the CPU allocator's events in the profiler's tree", "training on a CPU ends with a traceback",
        check=checks.check_profiler, words="_EventType experimental_event_tree alloc_size"),
    Api("torch", "distributed.Reducer._get_zeros_like_grad_buckets", "memory/cpu_profile.py", "counts DDP's buckets",
        "DDP on a CPU ends with a traceback"),
    # In predictions: operators and tensors
    Api("torch", "library.Library.impl", "memory/kernels.py",
        "CUDA's autocast rules, dropout and attention replace the CPU's", WRONG_PREDICTION, check=checks.check_library,
        words="impl Library"),
    Api("torch", "library.Library._destroy", "memory/kernels.py", "takes the replacements back",
        "a process goes on with CUDA's kernels on its CPU", signature="self"),
    *[
        Api("torch", f"_C.{name}", "memory/kernels.py", "leaves autocast out", NO_PREDICTION)
        for name in ("_ExcludeDispatchKeyGuard", "DispatchKeySet", "DispatchKey.AutocastCPU")
    ],
    Api("torch", "_ops.OpOverload", "memory/kernels.py", "the type of an operator", NO_PREDICTION),
    *[
        Api("torch", f"ops.aten.{name}", "memory/kernels.py", why, WRONG_PREDICTION)
        for name, why in (
            ("_scaled_dot_product_flash_attention", "the attention of a GPU"),
            ("_scaled_dot_product_efficient_attention", "the attention of a GPU"),
            ("_scaled_dot_product_attention_math", "the attention of a GPU"),
            ("_scaled_dot_product_flash_attention_backward", "has a workspace on a GPU"),
            ("_scaled_dot_product_efficient_attention_backward", "has a workspace on a GPU"),
            ("_scaled_dot_product_flash_attention_for_cpu", "has a workspace on a CPU"),
            ("_scaled_dot_product_flash_attention_for_cpu_backward", "has a workspace on a CPU"),
            ("_softmax_backward_data", "has a workspace on a GPU"),
            ("_safe_softmax", "has a workspace"),
        )
    ],
    Api("bitsandbytes", "ops.gemm_4bit", "memory/kernels.py", "its workspace is computed from its first arguments",
        WRONG_PREDICTION, check=checks.check_gemm_4bit, words="gemm_4bit"),
    Api("torch", "ops.aten._local_scalar_dense", "memory/recorder.py", "what .item() runs: it is answered in a trace",
        NO_PREDICTION, check=checks.check_item, words="_local_scalar_dense"),
    Api("torch", "_C._current_autograd_node", "memory/recorder.py", "whose backward runs, by its number",
        "allocations of the backward pass get no module", check=checks.check_autograd_nodes,
        words="_C _current_autograd_node _sequence_nr"),
    Api("torch", "autograd._get_sequence_nr", "memory/recorder.py", "the number of the next node",
        "allocations of the backward pass get another module", check=checks.check_autograd_nodes,
        words="_get_sequence_nr"),
    Api("torch", "FakeTensor(fake_mode, elem, device), .constant, .fake_device", "memory/repeated.py",
        "makes what an operator returned before, and tells what its arguments are", WRONG_PREDICTION,
        check=checks.check_fake_tensor, words="FakeTensor constant fake_device"),
    Api("torch", "ops.prim.device.default", "memory/recorder.py", "where a fake tensor is, asked at each use",
        "predictions are slow", words="prim device fake_device"),
    *[
        Api("torch", f"utils._python_dispatch.TorchDispatchMode.{name}", "memory/recorder.py memory/partly_fake.py",
            "overridden: Dynamo need not be told to leave each operator alone", "predictions are slow",
            signature="")
        for name in ("_should_skip_dynamo",)
    ],
    Api("torch", "_subclasses.fake_tensor.FakeTensorMode.dispatch", "memory/partly_fake.py",
        "makes up what an operator returns", NO_PREDICTION, signature="self, func, types, args, kwargs"),
    Api("torch", "UntypedStorage._cdata", "memory/recorder.py memory/partly_fake.py memory/repeated.py",
        "the address that tells storages apart", WRONG_PREDICTION, check=checks.check_storage_address),
    Api("torch", "Tensor._is_view", "memory/recorder.py", "whether autograd adds in place", WRONG_PREDICTION),
    Api("torch", "_prims_common.is_non_overlapping_and_dense_or_false", "memory/recorder.py",
        "whether autograd adds in place", NO_PREDICTION, signature="a"),
    Api("torch", "_subclasses.fake_tensor.FakeTensorMode", "memory/partly_fake.py", "tensors without data",
        NO_PREDICTION,
        signature="allow_fallback_kernels, allow_non_fake_inputs, shape_env, static_shapes, export"),
    Api("torch", "FakeTensor.device", "memory/stand_in.py", "tells cpu:0, the device, from cpu, the host",
        "host and device memory are silently mixed", check=checks.check_fake_devices, words="cpu:0"),
    *[
        Api("torch", f"_subclasses.fake_tensor.{name}", files, "tells what is fake, and what asks for its data",
            NO_PREDICTION)
        for name, files in (("FakeTensor", "memory/recorder.py memory/partly_fake.py memory/placed.py "
                             "memory/repeated.py"),
                            ("DataDependentOutputException", "memory/recorder.py"),
                            ("DynamicOutputShapeException", "memory/recorder.py"))
    ],
    Api("torch", "ops.aten._grouped_mm, and _meta_registrations._create_grouped_mm_output_tensor",
        "memory/partly_fake.py", "a product's form in the dtypes that the meta kernel refuses",
        "predictions of mixtures of experts fail", check=checks.check_grouped_mm,
        words="_grouped_mm _create_grouped_mm_output_tensor"),
    Api("torch", "OpOverload._schema.is_mutable", "memory/repeated.py", "whether an operator writes to an argument",
        WRONG_PREDICTION, check=checks.check_partly_fake, words="_schema is_mutable"),
    Api("torch", "ops.aten._unsafe_index, ._to_copy, and an operator's _schema", "memory/partly_fake.py",
        "which operators select by a mask or send to a device, and which argument they write to", NO_PREDICTION,
        check=checks.check_partly_fake, words="_unsafe_index _to_copy _schema alias_info"),
    Api("torch", "utils._python_dispatch.TorchDispatchMode", "memory/recorder.py benchmarks/operations.py",
        "sees every operator", NO_PREDICTION),
    Api("torch", "names of operators, and their _schema", "memory/work.py",
        "tells which operators launch nothing, take several kernels or let the host wait",
        "the time of a step is predicted wrongly", check=checks.check_work,
        words="_unsafe_view _scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward _unsafe_index _to_copy _local_scalar_dense _unique2 "
        "_grouped_mm _foreach _schema alias_info"),
    Api("torch", "utils._pytree.tree_map_only", "memory/partly_fake.py",
        "puts others in the place of an operator's tensors", NO_PREDICTION),
    Api("torch", "nn.modules.module.register_module_forward_hook", "memory/recorder.py", "which module runs",
        NO_PREDICTION, signature="hook, with_kwargs, always_call"),
    Api("torch", "nn.modules.module.register_module_forward_pre_hook", "memory/recorder.py", "the same", NO_PREDICTION,
        signature="hook"),
    Api("torch", "nn.Module._parameters, ._buffers", "memory/trace.py", "tensors are replaced by fake ones",
        NO_PREDICTION, check=checks.check_module_tables, words="_parameters _buffers"),
    Api("torch", "nn.Module._apply", "memory/zero.py", "replaced: fake parameters refuse to be moved", NO_PREDICTION,
        signature="self, fn, recurse"),
    Api("torch", "get_rng_state", "memory/trace.py", "replaced: checkpointing keeps its result",
        "predictions lack a few KiB a layer", check=checks.check_checkpoint_keeps_random_state, words="get_rng_state"),
    Api("transformers", "GenerationMixin._has_unfinished_sequences", "memory/known.py",
        "replaced: whether answers have ended depends on data", NO_PREDICTION, check=checks.check_generation,
        words="_has_unfinished_sequences"),
    Api("transformers", "warning of a fallback, by Logger.warning_once", "memory/notes.py",
        "names the packages whose kernels a model would use", "a prediction does not name them",
        check=checks.check_fallback_warning, words="warning_once FALLBACK"),
    Api("torch", "ops.aten._grouped_mm", "memory/notes.py", "tells that a model has experts", "the same",
        words="_grouped_mm"),
    Api("peft", "tuners.lora.dora.dequantize_module_weight", "memory/known.py",
        "replaced: it knows a 4-bit weight by a class that fake tensors lack",
        "predictions with --use_dora and --quantize fail", check=checks.check_dora, words="dequantize_module_weight"),
    *[
        Api("accelerate", f"state.{name}._shared_state", "memory/probed_step.py",
            "cleared and put back: a prediction has an accelerator of its own",
            "a prediction inside a run changes its precision or accumulation", words=f"{name} _shared_state")
        for name in ("PartialState", "AcceleratorState", "GradientState")
    ],
    Api("torch", "cuda.memory._snapshot, ._dump_snapshot", "memory/snapshot.py", "its structure is written",
        "PyTorch's viewer does not show a predicted step", check=checks.check_snapshot,
        words="_snapshot _dump_snapshot"),
    Api("accelerate", "Accelerator.backward", "memory/probed_step.py",
        "replaced: tells where the backward pass begins", "wrong phases", signature="self, loss, kwargs"),
    Api("torch", "callers of Tensor.item in accelerate, DeepSpeed, torch and transformers", "memory/known.py",
        "their question is known, and so is the answer of the traced step", "a prediction prints a warning",
        check=checks.check_readers, words="READERS _get_value _get_logits_processor _prepare_special_tokens"),
    # In predictions under DeepSpeed
    Api("torch", "testing._internal.distributed.fake_pg.FakeStore", "memory/stand_in.py memory/fsdp2.py",
        "processes that do not exist", "predictions under ZeRO fail", check=checks.check_fake_process_group,
        words="testing _internal FakeStore fake"),
    Api("torch", "distributed.fsdp._fully_shard: _get_device_from_mesh, alloc_storage, free_storage, allocate",
        "memory/fsdp2.py", "replaced: the stand-in device, and memory that no operator allocates",
        "predictions under FSDP2 fail or are silently wrong", check=checks.check_fsdp_parts,
        words="_get_device_from_mesh alloc_storage free_storage DefaultAllocMixin _fully_shard _fsdp_collectives "
        "_fsdp_param FakeStore fake"),
    Api("torch", "cpu.stream", "memory/fsdp2.py", "replaced: FSDP2 enters it to change streams",
        "predictions under FSDP2 put all memory in one pool", check=checks.check_fsdp_streams, words="stream"),
    Api("torch", "distributed.tensor._sharding_prop.ShardingPropagator._propagate_tensor_meta_non_cached",
        "memory/fsdp2.py", "replaced: DTensor's own fake tensors are not recorded",
        "predictions under FSDP2 count them", signature="self, op_schema",
        words="_sharding_prop _op_schema _propagate_tensor_meta_non_cached"),
    Api("torch", "utils._python_dispatch._disable_current_modes", "memory/fsdp2.py", "keeps them from the recorder",
        "predictions under FSDP2 fail", signature=""),
    Api("accelerate", "utils.fsdp_utils.fsdp2_switch_optimizer_parameters", "memory/fsdp2.py",
        "tells parameters apart by data_ptr, which a fake tensor is given",
        "predictions under FSDP2 lack the optimizer",
        check=checks.check_fsdp_addresses, words="data_ptr"),
    Api("deepspeed", "accelerator.cpu_accelerator.CPU_Accelerator", "memory/stand_in.py",
        "the stand-in overrides it", "predictions under ZeRO fail", check=checks.check_stand_in,
        words="CPU_Accelerator"),
    Api("deepspeed", "accelerator.set_accelerator", "memory/stand_in.py", "puts the stand-in in place",
        "predictions under ZeRO fail", signature="accel_obj"),
    Api("deepspeed", "runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks",
        "memory/stand_in.py", "replaced: there is no other process to compare with", "predictions under ZeRO-3 fail"),
    Api("deepspeed", "DS_ACCELERATOR", "utils.py", "names the accelerator, which DeepSpeed would look for",
        "a warning", check=checks.check_deepspeed_variable, words="DS_ACCELERATOR"),
    Api("deepspeed", "runtime.precision_config.DeepSpeedBF16Config", "step.py",
        "check_grad_overflow skips steps with NaN in bf16",
        "NaN silently reaches the weights", words="check_grad_overflow"),
    Api("deepspeed", "runtime.constants.ZERO_FORCE_DS_CPU_OPTIMIZER", "memory/zero.py",
        "takes torch's AdamW with offload", "predictions under ZeRO compile an operator",
        words="zero_force_ds_cpu_optimizer"),
    Api("deepspeed", "runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.fetch_sub_module",
        "memory/zero.py", "replaced on the instance: what it allocates are weights", "predictions under ZeRO-3 fail"),
    *[
        Api("deepspeed", f"utils.{name}", "training/training_state.py", "reads or writes a sharded tensor",
            "resuming under ZeRO fails", signature=signature)
        for name, signature in (
            ("safe_get_full_fp32_param", "param"),
            ("safe_get_full_optimizer_state", "param, optim_state_key"),
            ("safe_set_full_fp32_param", "param, value"),
            ("safe_set_full_optimizer_state", "param, value, optim_state_key"),
            ("safe_set_local_fp32_param", "param, value"),
            ("safe_set_local_optimizer_state", "param, value, optim_state_key"),
            ("lazy_init_hp_params_optimizer_state", "lp_param_list, flat_hp_partition, optimizer_state"),
        )
    ],
    Api("deepspeed", "runtime.fp16.loss_scaler.DynamicLossScaler", "training/training_state.py",
        "its numbers are saved and restored", "a resumed fp16 run under ZeRO has another loss scale",
        check=checks.check_loss_scaler, words="loss_scaler"),
    # DeepSpeed's engines
    *[
        Api("deepspeed", f"engine.{name}", "memory/zero.py", "replaced: tells the phase", "wrong phases",
            stages=(2, 3), words=f"engine.{name}")
        for name in ("forward", "backward", "step")
    ],
    Api("deepspeed", "engine.zero_optimization_partition_weights", "memory/zero.py", "tells stage 3", WRONG_PREDICTION,
        stages=(2, 3)),
    Api("deepspeed", "engine.optimizer.optimizer", "memory/zero.py training/training_state.py",
        "torch's optimizer inside DeepSpeed's", "resuming and predicting under ZeRO fail", stages=(2, 3)),
    Api("deepspeed", "engine.optimizer.loss_scaler.dynamic", "training/training_state.py",
        "whether losses are scaled, in fp16", "resuming under ZeRO fails", stages=(2, 3),
        words="loss_scaler dynamic"),
    Api("deepspeed", "engine.optimizer.single_partition_of_fp32_groups", "training/training_state.py",
        "the fp32 partitions that the optimizer updates", "resuming under ZeRO fails", stages=(2,)),
    Api("deepspeed", "engine.optimizer.bit16_groups", "training/training_state.py",
        "the parameters of each partition", "resuming under ZeRO fails", stages=(2,)),
    Api("deepspeed", "engine.optimizer.fp32_partitioned_groups_flat", "training/training_state.py memory/zero.py",
        "the fp32 partitions that the optimizer updates", "resuming and predicting under ZeRO-3 fail",
        stages=(3,)),
    Api("deepspeed", "engine.optimizer.grad_partitions_flat_buffer", "memory/zero.py", "is called gradients",
        "predictions under ZeRO fail", stages=(3,)),
    Api("deepspeed", "engine.optimizer.ipg_buckets", "memory/zero.py", "is called communication",
        "predictions under ZeRO fail", stages=(2, 3)),
    Api("deepspeed", "engine.optimizer.offload_optimizer", "memory/zero.py", "whether AdamW runs on the host",
        WRONG_PREDICTION, stages=(3,)),
    Api("deepspeed", "engine.optimizer.parameter_offload.get_param_coordinator", "memory/zero.py",
        "its coordinator fetches weights", WRONG_PREDICTION, stages=(3,),
        words="parameter_offload get_param_coordinator"),
    Api("deepspeed", "engine.optimizer._post_step", "memory/zero.py",
        "replaced on the instance: what it allocates are weights", "predictions under ZeRO-3 fail", stages=(3,)),
    *[
        Api("deepspeed", f"parameter.{name}", files, why, breaks, stages=(3,))
        for name, files, why, breaks in (
            ("ds_id", "models/gather.py", "tells a split parameter", "ZeRO-3 saves an empty adapter"),
            ("ds_numel", "layers/quantization.py", "its unsharded size", "wrong counts of parameters"),
            ("ds_shape", "training/training_state.py", "its unsharded shape", "resuming under ZeRO-3 fails"),
            ("ds_tensor", "training/training_state.py memory/zero.py", "this process's part",
             "resuming and predicting under ZeRO-3 fail"),
        )
    ],
    # Tools around training
    Api("lmms_eval", "api.model.lmms._rank, ._world_size", "evaluation/lmms_eval_mgm.py",
        "overridden: which process this is", "several processes answer the same", check=checks.check_lmms_eval,
        words="_rank _world_size MODEL_REGISTRY_V2 cli_evaluate"),
    Api("transformers", "TrainingArguments", "benchmarks/step_peers.py", "max_steps is changed between two runs",
        "the benchmark fails", words="max_steps"),
    Api("torch", "utils.flop_counter.flop_registry", "memory/work.py", "counts operations",
        "no run starts"),
    Api("torch", "autograd.profiler_util.FunctionEvent", "benchmarks/step_watch.py",
        "what ran on a GPU, and when", "the benchmark fails", check=checks.check_function_events,
        words="device_type is_user_annotation time_range elapsed_us"),
    Api("accelerate", "commands.estimate.estimate_training_usage", "benchmarks/headline.py", "another estimate",
        "the benchmark fails", signature="bytes, mixed_precision, msamp_config"),
    Api("accelerate", "utils.calculate_maximum_sizes", "benchmarks/headline.py", "another estimate",
        "the benchmark fails", signature="model"),
    Api("deepspeed", "runtime.zero.stage3.estimate_zero3_model_states_mem_needs", "benchmarks/headline.py",
        "another estimate", "the benchmark fails",
        signature="total_params, largest_layer_params, num_gpus_per_node, num_nodes, cpu_offload, "
        "cpu_offload_params, zero_init, additional_buffer_factor"),
    Api("deepspeed", "runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs", "benchmarks/headline.py",
        "another estimate", "the benchmark fails",
        signature="total_params, num_gpus_per_node, num_nodes, cpu_offload, additional_buffer_factor"),
]  # fmt: skip


def label(api: Api) -> str:
    return f"{api.library}.{api.name}".replace(" ", "_")


@pytest.mark.parametrize("api", [api for api in APIS if not api.stages], ids=label)
def test_it_is_there(api: Api) -> None:
    """By its path and parameters, or by a small run that uses it as the project does."""
    try:
        if api.check is not None:
            api.check()
        else:
            found = pkgutil.resolve_name(f"{api.library}.{api.name}")
            parameters = ", ".join(inspect.signature(found).parameters) if api.signature is not None else None
            assert parameters == api.signature, f"its parameters are ({parameters}), were ({api.signature})"
    except (AssertionError, AttributeError, ImportError, TypeError, RuntimeError, KeyError) as error:
        pytest.fail(api.explain(error), pytrace=api.check is not None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_engine_has_them(stage: int) -> None:
    """After a step of a real engine, in a process of its own."""
    apis = [api for api in APIS if stage in api.stages]
    with launched(Strategy.from_flags(f"zero{stage}")), process_pool() as pool:
        missing = pool.submit(missing_in_engine, [api.name for api in apis]).result()
    assert not missing, "\n".join(api.explain(f"missing in stage {stage}") for api in apis if api.name in missing)


def missing_in_engine(names: list[str]) -> list[str]:
    """The names that the engine, or one of its parameters, lacks; and the settings that it does not follow."""
    from step import build_accelerator

    quiet_libraries()
    accelerator = build_accelerator("bf16", 1, max_grad_norm=0.5)
    model = nn.Linear(64, 64).bfloat16()
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(engine(torch.ones(1, 64, dtype=torch.bfloat16)).sum())
    optimizer.step()
    assert engine.gradient_clipping() == 0.5 and engine.train_micro_batch_size_per_gpu() == 1, "settings are ignored"
    assert engine._config.bfloat16_config.check_grad_overflow, "the setting is ignored"
    assert all(hasattr(bucket, "buffer") for bucket in engine.optimizer.ipg_buckets.values()), "a bucket's buffer"
    parameter = next(engine.module.parameters())
    missing = []
    for name in names:
        owner = {"engine": engine, "parameter": parameter}[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            owner = getattr(owner, part, None)
        if owner is None:
            missing.append(name)
    return missing


# Endings of the project's own names; and what the standard library documents.
OWN_WORDS = {"_bytes", "_checkpointing", "_exit", "_getframe"}


@cache
def sources() -> dict[str, ast.Module]:
    files = (path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).as_posix().startswith(("tests/", ".")))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


@pytest.mark.parametrize("api", APIS, ids=label)
def test_it_is_used_where_the_page_says(api: Api) -> None:
    for file in api.files.split():
        text = (ROOT / file).read_text()
        for word in api.used_words:
            is_used = re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}", text) is not None
            assert is_used, f"{file} has no {word}: correct the page"


def test_no_private_name_is_missing_on_the_page() -> None:
    """Attributes, imports and strings that begin with an underscore and are not the project's own."""
    own = {name for tree in sources().values() for name in own_names(tree)} - overridden_names() | OWN_WORDS
    on_page = {
        (word, file)
        for api in APIS
        for file in api.files.split()
        for word in (*re.split(r"\W+", api.name), *api.used_words)
    }
    missing = [
        f"{file}:{line}: {name}"
        for file, tree in sources().items()
        for name, line in private_names(tree)
        if name not in own and (name, file) not in on_page
    ]
    assert not missing, "put them on the page, or better, do without:\n" + "\n".join(missing)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of every private attribute, part of an imported path, and string that is such a name."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.ClassDef):
            names = class_names(node)
        yield from ((name, node.lineno) for name in names if is_private(name))


def class_names(node: ast.ClassDef) -> set[str]:
    """What a class defines: methods, class attributes, and attributes of `self`."""
    names = {part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            if isinstance(part.value, ast.Name) and part.value.id == "self":
                names.add(part.attr)
    return names


def own_names(tree: ast.Module) -> set[str]:
    """What the project itself defines: functions, variables, and what its classes define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= class_names(node)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def overridden_names() -> set[str]:
    """Private names that a class of the project defines and a library's base class has too."""
    own_packages = {file.partition("/")[0].removesuffix(".py") for file in sources()}
    found = {"_rank", "_world_size"}  # of lmms-eval, which may not be installed
    for file, tree in sources().items():
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or file == "evaluation/lmms_eval_mgm.py":
                continue
            if names := set(filter(is_private, class_names(node))):
                module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
                bases = getattr(module, node.name).__mro__
                foreign = [base for base in bases if base.__module__.partition(".")[0] not in own_packages]
                found |= {name for name in names if any(hasattr(base, name) for base in foreign)}
    return found
