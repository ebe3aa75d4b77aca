"""Small runs for test_private_apis.py: each fails if a library no longer does what the project relies on."""

import ast
import importlib
import inspect
import itertools
import mmap
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from unittest.mock import patch

import pytest
import torch
import transformers as tf
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DeepSpeedPlugin, convert_outputs_to_fp32, extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import dora
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from PIL import Image
from tiny_families import PROCESSORS, tiny_tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, GemmaConfig, GemmaForCausalLM, GenerationMixin
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from chat.expansion import watched
from layers.model_loss import use_model_loss
from layers.quantization import nf4_config, quantize_language_model, quantize_linear, state_tensors
from layers.tiled_mlp import layers_with_mlp
from memory import work
from memory.cpu_profile import memory_events, profile_memory
from memory.kernels import CUDA_AUTOCAST_FP32_OUTPUT, CUDA_AUTOCAST_TO_FP32, kernels_of, overload_named
from memory.known import READERS
from memory.notes import noted
from memory.partly_fake import PartlyFakeMode
from memory.record import Allocation, Record
from memory.snapshot import snapshot
from mgm.configuration_mgm import tiny
from mgm.modeling_mgm import MGMForConditionalGeneration
from models.processors import VideoSettings
from utils import UserError


ROOT = Path(__file__).parent.parent
TOKENS = torch.arange(4, 10)[None]


def small_gemma(**config: object) -> GemmaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(num_attention_heads=2, num_key_value_heads=1, **(sizes | config))).eval()


def check_video_settings() -> None:
    """A processor takes them for a video processor and saves what they hold."""
    images, tokenizer = tf.Qwen2VLImageProcessorPil(), tiny_tokenizer(image_token="<image>", video_token="<video>")
    processor = tf.Qwen2VLProcessor(images, tokenizer, VideoSettings({"fps": 3}))
    assert processor.to_dict()["video_processor"] == {"fps": 3}


def check_pixtral_resize() -> None:
    """Both files have the same function."""
    folder = Path(tf.__file__).parent / "models/pixtral"
    bodies = []
    for name in ("image_processing_pixtral.py", "image_processing_pil_pixtral.py"):
        tree = ast.parse((folder / name).read_text())
        named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        bodies.append(ast.dump(named["get_resize_output_image_size"]))
    assert bodies[0] == bodies[1], "they differ"


@contextmanager
def must_call(owner: object, *names: str) -> Iterator[None]:
    """Fails unless each of the owner's functions is called inside, found under the name that the project patches."""
    called: set[str] = set()

    def noting(name: str) -> Callable:
        original = getattr(owner, name)

        def function(*args: object, **kwargs: object) -> object:
            called.add(name)
            return original(*args, **kwargs)

        return function

    with patch.multiple(owner, **{name: noting(name) for name in names}):
        yield
    assert called == set(names), f"no longer called: {', '.join(sorted(set(names) - called))}"


def check_fallback_warning() -> None:
    @use_kernel_func_from_hub_with_fallback("some_function", "no_such_package")
    def function() -> None:
        pass

    record = Record()
    with noted(record, "cuda"):
        function()
    assert [note.split()[0] for note in record.notes] == ["no_such_package"]


def check_generation() -> None:
    num_tokens = itertools.count()
    with patch.object(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(num_tokens) < 2):
        generated = small_gemma().generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=8)
    assert generated.shape[1] - TOKENS.shape[1] == 2, "generate does not end when it says so"


def check_checkpointing_flags() -> None:
    model = MGMForConditionalGeneration(tiny())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    mining = model.model.patch_info_mining
    assert mining.gradient_checkpointing and callable(mining._gradient_checkpointing_func)
    layers = list(layers_with_mlp(model.model.language_model))
    assert len(layers) == tiny().text_config.num_hidden_layers, "layers or their MLPs are no longer found"
    assert all(layer.gradient_checkpointing for layer in layers), (
        "a layer is not checkpointed although it was asked for"
    )


def check_checkpointing_function() -> None:
    """A layer hands over its forward, with its keyword arguments, and its hidden states."""
    model = small_gemma().train()
    model.activation_checkpointing_enable()
    given: list[tuple] = []
    for layer in layers_with_mlp(model):
        layer._gradient_checkpointing_func = lambda run, *args: given.append((run, args)) or run(*args)
    model(TOKENS)
    assert len(given) == model.config.num_hidden_layers
    for run, (hidden_states, *_) in given:
        assert isinstance(run, partial) and isinstance(run.args[0], GradientCheckpointingLayer)
        assert "position_embeddings" in run.keywords and hidden_states.dim() == 3


def check_device_states() -> None:
    assert get_device_states(torch.zeros(1)) == ([], [])
    set_device_states([], [], device_type="cpu")


def check_input_gradients() -> None:
    base = small_gemma()
    base.activation_checkpointing_enable()
    base.disable_input_require_grads()
    base = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).get_base_model()
    assert base.get_input_embeddings()(TOKENS).requires_grad, "PEFT adds none: undoing it is of no use"
    base.disable_input_require_grads()
    assert not base.get_input_embeddings()(TOKENS).requires_grad


def check_loss_function() -> None:
    model = small_gemma()
    before = model.loss_function
    assert before is ForCausalLMLoss
    model.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    assert model(input_ids=TOKENS, labels=TOKENS).loss == 7
    model.loss_function = before
    assert model(input_ids=TOKENS, labels=TOKENS).loss != 7


def check_version() -> None:
    tensor = torch.zeros(())
    assert tensor.clone()._version == 0
    tensor += 1
    assert tensor._version == 1


def check_attribute_before_module() -> None:
    model = small_gemma()
    vars(model)["lm_head"] = lambda hidden_states: hidden_states
    assert model(input_ids=TOKENS).logits.shape[-1] == 64
    assert dict(model.named_children())["lm_head"] is not model.lm_head


def check_unwrapping() -> None:
    model = small_gemma()
    use_model_loss(model, chunked=True)
    model._original_forward = model.forward  # as Accelerator.prepare_model leaves it
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert unwrapped.forward.__func__.computes_loss


def check_parts() -> None:
    model = MGMForConditionalGeneration(tiny())
    assert model.get_decoder() is model.model.language_model
    assert model.get_encoder("image") is model.model.vision_tower
    gemma = small_gemma()
    assert gemma.get_decoder() is gemma.model and gemma.get_encoder("image") in (gemma, gemma.model)


def check_clip() -> None:
    model = MGMForConditionalGeneration(tiny()).eval().model
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.clip_features(pixels), expected)
    assert len(model.unused_modules()) == 2 and isinstance(model.vision_tower.post_layernorm, nn.LayerNorm)


def check_convnext() -> None:
    config = tiny()
    config.vision_config_aux.layer_norm_eps = 1e-3
    tower = MGMForConditionalGeneration(config).model.vision_tower_aux
    assert type(tower.layernorm) is nn.Identity
    assert type(AutoModel.from_config(config.vision_config_aux).layernorm) is nn.LayerNorm, (
        "the classifier's norm is elsewhere"
    )
    norms = [module for module in tower.modules() if "LayerNorm" in type(module).__name__]
    num_stages, num_blocks = 4, sum(config.vision_config_aux.depths)
    assert len(norms) == num_blocks + num_stages, "the embeddings', the down-samplings' and the blocks'"
    assert all(isinstance(norm, nn.LayerNorm) and norm.eps == 1e-3 for norm in norms), "an eps is not set"


def check_tied_head() -> None:
    model = MGMForConditionalGeneration(tiny())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def check_embed_scale() -> None:
    embeddings = small_gemma().get_input_embeddings()
    torch.testing.assert_close(embeddings.embed_scale, torch.tensor(64**0.5))
    torch.testing.assert_close(embeddings(TOKENS), embeddings.weight[TOKENS] * 8)


def check_peft_paths() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate_proj"], use_dora=True)
    model = get_peft_model(small_gemma(), config)
    names = " ".join(name for name, _ in model.named_parameters())
    layer = "base_model.model.model.layers.0"
    for piece in (
        f"{layer}.self_attn.q_proj.base_layer.weight",
        f"{layer}.self_attn.q_proj.lora_A.default.weight",
        f"{layer}.self_attn.q_proj.lora_magnitude_vector.default.weight",
        f"{layer}.mlp.gate_proj.original_module.weight",
        f"{layer}.mlp.gate_proj.modules_to_save.default.weight",
    ):
        assert piece in names, f"{piece} is called otherwise"


def check_dora() -> None:
    model = get_peft_model(small_gemma(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with must_call(dora, "dequantize_module_weight"):
        model(input_ids=TOKENS)


def check_peft_asks_for_4_bits() -> None:
    model = small_gemma()
    quantize_language_model(model, "model", torch.float32)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert any(isinstance(module, LoraLinear4bit) for module in peft_model.modules()), "PEFT asks otherwise"


def check_quant_state() -> None:
    layer = quantize_linear(nn.Linear(64, 64, bias=False), torch.float32)
    tensors = {name.removeprefix("weight.quant_state.").removeprefix("weight.") for name, _ in state_tensors(layer)}
    assert tensors == {"absmax", "code", "offset", "state2.absmax", "state2.code"}
    assert layer.weight.quant_state.shape.numel() == 64 * 64
    assert layer.support_avx512bf16_for_cpu in (True, False)


def check_dynamic_map() -> None:
    from bitsandbytes import functional

    with patch.dict(functional.name2qmap, clear=True):
        quantize_linear(nn.Linear(64, 64, bias=False), torch.float32)
        assert functional.name2qmap.keys() >= {"dynamic"}


def check_gemm_4bit() -> None:
    names = [argument.name for argument in torch.ops.bitsandbytes.gemm_4bit.default._schema.arguments]
    assert names[:5] == ["A", "B", "shapeB", "absmax", "blocksize"], f"its arguments are {names}"


def check_skip_modules() -> None:
    assert nf4_config(torch.float32, "model").llm_int8_skip_modules, "the towers would be quantized"


class Operators(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.add(func)
        return func(*args, **kwargs or {})


def check_item() -> None:
    with Operators() as mode:
        torch.ones(1).item()
    assert torch.ops.aten._local_scalar_dense.default in mode.seen


def check_autograd_nodes() -> None:
    seen = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch._C._current_autograd_node()._sequence_nr())
            return gradient

    leaf = torch.ones(1, requires_grad=True)
    before = torch.autograd._get_sequence_nr()
    output = Noting.apply(leaf)
    after = torch.autograd._get_sequence_nr()
    output.backward()
    assert before <= seen[0] < after, "the node that runs has no number between those around its forward"
    assert torch._C._current_autograd_node() is None, "outside the backward pass there is none"


def check_storage_address() -> None:
    one, other = torch.zeros(4), torch.zeros(4)
    assert one.untyped_storage()._cdata == one[1:].untyped_storage()._cdata != other.untyped_storage()._cdata
    assert one[1:]._is_view() and not one._is_view()


def check_module_tables() -> None:
    module = nn.BatchNorm1d(2)
    replacement = nn.Parameter(torch.zeros(2))
    module._parameters["weight"] = replacement
    module._buffers["running_mean"] = torch.ones(2)
    assert module.weight is replacement and module.running_mean.sum() == 2


def check_hook_tables() -> None:
    module = nn.Linear(1, 1)
    assert not module._forward_hooks and not module._forward_pre_hooks
    handles = module.register_forward_hook(print), module.register_forward_pre_hook(print)
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
    for handle in handles:
        handle.remove()
    assert not module._forward_hooks and not module._forward_pre_hooks


def check_fake_devices() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        device, host = torch.empty(2, device="cpu:0"), torch.empty(2, device="cpu")
        assert device.device == torch.device("cpu:0") != host.device
        assert device.to("cpu").device == host.device


def check_grouped_mm() -> None:
    """The real kernel takes fp32, and its output has the form that is made up for it."""
    x, weights, ends = torch.ones(8, 16), torch.ones(2, 16, 32), torch.tensor([3, 8], dtype=torch.int32)
    real = torch.ops.aten._grouped_mm.default(x, weights, ends)
    with PartlyFakeMode() as fake_mode:
        made_up = torch.ops.aten._grouped_mm.default(fake_mode.from_tensor(x), weights, ends)
    assert (made_up.shape, made_up.stride(), made_up.dtype) == (real.shape, real.stride(), real.dtype)


def check_fake_tensor() -> None:
    with FakeTensorMode() as fake_mode:
        made = FakeTensor(fake_mode, torch.empty(3, device="meta"), torch.device("cpu"))
        assert (made + 1).shape == (3,) and made.device == made.fake_device == torch.device("cpu")
        constant = torch.tensor(2.0).constant
    assert made.constant is None and constant == 2


def check_partly_fake() -> None:
    """An operator's schema tells that it writes to its first argument alone; indexing by a mask is one operator, so
    is sending to a device."""
    written = [argument.alias_info is not None for argument in torch.ops.aten.add_.Tensor._schema.arguments]
    assert written == [True, False, False]
    assert torch.ops.aten.add_.Tensor._schema.is_mutable and not torch.ops.aten.add.Tensor._schema.is_mutable
    with PartlyFakeMode() as fake_mode:
        x, mask = fake_mode.from_tensor(torch.ones(3, 2)), torch.tensor([True, False, True])
        assert x[mask].shape == torch.ops.aten._unsafe_index.Tensor(x, [mask]).shape == (2, 2)
        assert torch.equal(torch.ops.aten._to_copy(mask, device="cpu"), mask)
    with PartlyFakeMode("cpu:0"):
        assert mask.to("cpu:0").data_ptr() == mask.data_ptr()


def check_work() -> None:
    """Operators have the names by which they are told apart, and schemas tell which are views."""
    for name in (*work.FREE, *work.LAUNCHES, *work.SELECTING, *work.WRITING, *work.COPYING, *work.WAITING):
        assert name == "gemm_4bit" or hasattr(torch.ops.aten, name), f"there is no aten.{name}"
    assert hasattr(torch.ops.aten, "_grouped_mm") and hasattr(torch.ops.aten, "_foreach_add_")
    for name, kind in (("view", "view"), ("add_", "kernel"), ("empty", "view"), ("nonzero", "wait")):
        overload = getattr(torch.ops.aten, name)
        assert work.kind_of(getattr(overload, overload.overloads()[0]), name) == kind


def check_checkpoint_keeps_random_state() -> None:
    with must_call(torch, "get_rng_state"):
        checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)


def check_library() -> None:
    for name in (*CUDA_AUTOCAST_TO_FP32, *CUDA_AUTOCAST_FP32_OUTPUT):
        assert isinstance(overload_named(name), torch._ops.OpOverload), f"there is no aten.{name}"
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    for context, dtype in ((kernels_of("cuda"), torch.float32), (nullcontext(), torch.bfloat16)):
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            assert x.exp().dtype == dtype, "the replaced kernel is not called, or stays"


def check_profiler() -> None:
    with profile_memory() as profiler:
        tensor = torch.empty(1_000_000)
        del tensor
    events = memory_events(profiler)
    assert 4_000_000 in events and -4_000_000 in events, "allocations are no longer among the profiler's events"


def check_function_events() -> None:
    with profile_memory() as profiler:
        torch.empty(8)
    event = profiler.events()[0]
    assert event.device_type == torch.autograd.DeviceType.CPU and event.is_user_annotation is False
    assert event.time_range.elapsed_us() == event.time_range.end - event.time_range.start


def check_kineto_variable() -> None:
    library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(b"KINETO_LOG_LEVEL") >= 0


def check_fake_process_group() -> None:
    import torch.testing._internal.distributed.fake_pg

    assert "fake" in torch.distributed.Backend.backend_list


def check_optimizer_state() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    assert "foreach" in optimizer.param_groups[0]
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


class Failing(Dataset):
    """A data set whose samples fail in the way that `fail` does."""

    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        self.fail()


def raise_user_error() -> None:
    raise UserError("image 7: it is a UserError: of two words")


def kill_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_worker_exception() -> None:
    with pytest.raises(UserError) as raised:
        next(iter(DataLoader(Failing(raise_user_error), num_workers=1, multiprocessing_context="fork")))
    assert str(raised.value) == "of two words", "a UserError has lost its line on the way from a worker"


def check_dead_worker() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker.*\(pid(\(s\))? [\d, ]+\)") as raised:
            next(iter(DataLoader(Failing(kill_worker), num_workers=1, multiprocessing_context="fork")))
        assert "signal: Killed" in str(raised.value) or str(raised.value).endswith("exited unexpectedly")
        assert callable(signal.getsignal(signal.SIGCHLD)), "torch's handler raises it"
    finally:
        signal.signal(signal.SIGCHLD, handler)


def check_host_out_of_memory() -> None:
    from training.out_of_memory import asked_for, is_out_of_memory

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert asked_for(raised.value) == "tried to allocate 1048576.00 GiB of host memory"


def check_getitems() -> None:
    class Batches(Dataset):
        def __getitems__(self, indices: list[int]) -> list[list[int]]:
            return [indices]

    class Indices(list):
        pass

    batches = DataLoader(Batches(), batch_sampler=[Indices([1, 2])], collate_fn=lambda samples: samples[0])
    assert [type(indices) for indices in batches] == [Indices], "a micro-batch would lose what it carries"


def check_batch_sampler() -> None:
    class Sampler(list):
        batch_size, drop_last = None, False

    shards = [list(BatchSamplerShard(Sampler([[0, 1], [2, 3], [4], [5]]), 2, i, even_batches=False)) for i in range(2)]
    assert shards == [[[0, 1], [4]], [[2, 3], [5]]]


def check_launch_variables() -> None:
    source = inspect.getsource(importlib.import_module("accelerate.state")) + inspect.getsource(DeepSpeedPlugin)
    for name in ("USE_DEEPSPEED", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_ZERO3_INIT"):
        assert f"ACCELERATE_{name}" in source, f"accelerate no longer reads ACCELERATE_{name}"


def check_fsdp_variables() -> None:
    source = inspect.getsource(importlib.import_module("accelerate.utils.launch"))
    for name in (
        "ACCELERATE_USE_FSDP",
        *(f"FSDP_{name}" for name in ("VERSION", "AUTO_WRAP_POLICY", "OFFLOAD_PARAMS")),
    ):
        assert f'"{name}"' in source, f"accelerate's launcher no longer sets {name}"
    source = inspect.getsource(importlib.import_module("accelerate.state"))
    assert "self.__dict__.update(PartialState._shared_state)" in source


def check_fsdp_hooks() -> None:
    collectives = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    assert "_post_accumulate_grad_hooks" in inspect.getsource(collectives.foreach_reduce)


def check_fsdp_parts() -> None:
    """The modules call what is replaced, by the name under which it is replaced."""
    wrapper, parameters, collectives, group = (
        importlib.import_module(f"torch.distributed.fsdp._fully_shard.{name}")
        for name in ("_fully_shard", "_fsdp_param", "_fsdp_collectives", "_fsdp_param_group")
    )
    assert "device = _get_device_from_mesh(mesh)" in inspect.getsource(wrapper)
    assert "alloc_storage(tensor)" in inspect.getsource(parameters.FSDPParam.alloc_all_gather_outputs)
    assert "free_storage(tensor)" in inspect.getsource(parameters.FSDPParam.free_unsharded_param)
    assert "comm.allocate(" in inspect.getsource(collectives.foreach_all_gather)
    assert "comm.allocate(" in inspect.getsource(collectives.foreach_reduce)
    assert "DefaultAllGather()" in inspect.getsource(group.FSDPParamGroup)
    assert issubclass(collectives.DefaultReduceScatter, collectives.DefaultAllocMixin)


def check_fsdp_streams() -> None:
    collectives = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    source = inspect.getsource(collectives)
    assert "device_handle.stream(all_gather_copy_in_stream)" in source
    assert "device_handle.stream(reduce_scatter_stream)" in source
    assert torch.cpu.Stream() != torch.cpu.Stream()  # told apart


def check_fsdp_addresses() -> None:
    fsdp_utils = importlib.import_module("accelerate.utils.fsdp_utils")
    assert "mapping[p.data_ptr]" in inspect.getsource(fsdp_utils.fsdp2_switch_optimizer_parameters)


def check_agent_store_variable() -> None:
    source = inspect.getsource(torch.distributed.elastic.agent.server.local_elastic_agent)
    assert '"TORCHELASTIC_USE_AGENT_STORE": str(use_agent_store)' in source


def check_deepspeed_variable() -> None:
    from deepspeed.accelerator import real_accelerator

    assert "DS_ACCELERATOR" in inspect.getsource(real_accelerator)


def check_stand_in() -> None:
    """Each method that the stand-in overrides exists, with as many parameters, and no new one is abstract."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    assert not inspect.isabstract(CPU_Accelerator)
    tree = ast.parse((ROOT / "memory/stand_in.py").read_text())
    stand_in = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "StandIn")
    methods = [node for node in stand_in.body if isinstance(node, ast.FunctionDef)]
    assert methods
    for method in methods:
        original = inspect.getattr_static(CPU_Accelerator, method.name, None)
        assert original is not None, f"DeepSpeed no longer asks for {method.name}"
        if not isinstance(original, property):  # FloatTensor and its like return a function
            expected = list(inspect.signature(original).parameters)
            assert len(method.args.args) == len(expected), f"{method.name} takes {expected}"


def check_loss_scaler() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0, 2.0, 10, 1.0, 2, False)
    assert scaler.dynamic
    assert {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= vars(scaler).keys()


def check_readers() -> None:
    """Each function that may read a traced tensor's number is in its file."""
    for path, function in READERS:
        library, _, rest = path.partition("/")
        source = (Path(find_spec(library).origin).parent / rest).read_text()
        names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert function in names, f"{path} has no {function}"


def check_fingerprint() -> None:
    import datasets

    one = datasets.Dataset.from_dict({"a": [1]})
    other = one.map(lambda row: {"b": row["a"]}, new_fingerprint="abc", desc=None)
    assert isinstance(one._fingerprint, str) and other._fingerprint == "abc"


def check_name_or_path() -> None:
    assert GemmaConfig(name_or_path="a")._name_or_path == "a"


def check_lmms_eval() -> None:
    lmms_eval = pytest.importorskip("lmms_eval.api.model", reason="lmms-eval has an environment of its own")
    assert {"_rank", "_world_size"} <= vars(lmms_eval.lmms()).keys()


def check_processor_calls_its_tokenizer() -> None:
    """LLaVA's, with a tokenizer that watches: the text that it is given holds sixteen tokens for an image."""
    processor = PROCESSORS["llava"]("llava")
    watching, watch = watched(processor, ["a<image>b"])
    made = watching(text=["a<image>b"], images=[[Image.new("RGB", (56, 56))]])
    (expansion,) = watch.expansions
    assert expansion.text == "a" + "<image>" * 16 + "b" and expansion.images == [(1, 1 + 16 * len("<image>"))]
    assert watch.encodings[0].ids == list(made["input_ids"][0])


def check_snapshot() -> None:
    """A snapshot has the keys that torch documents, but for those of FX and of an out-of-memory error."""
    text = torch.cuda.memory._snapshot.__doc__
    bodies = re.findall(r"class (\w+)\(TypedDict\):\n(.*?)(?=\n +class |\n +Args:)", text, flags=re.S)
    documented = {name: set(re.findall(r"^ {12}(\w+):", body, flags=re.M)) for name, body in bodies}
    made = Allocation(1024, (256,), "float32", "aten.add.Tensor", "layers.0", "forward", 0, "activations")
    taken = snapshot(Record([(1024, made)], [(0, "forward")]))
    (segment,), (mapped, entry) = taken["segments"], taken["device_traces"][0]
    block, *_ = segment["blocks"]
    found = {"Snapshot": taken, "Segment": segment, "Block": block, "Frame": entry["frames"][0], "TraceEntry": entry}
    assert found.keys() == documented.keys(), f"torch documents {', '.join(documented)}"
    optional = {"fx_node_op", "fx_node_name", "fx_original_trace", "device_free"}
    for name, value in found.items():
        assert documented[name] - optional <= value.keys(), f"{name} lacks {documented[name] - value.keys()}"
    assert mapped.keys() == entry.keys()
