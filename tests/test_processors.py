"""Every family's own processor, without torchvision: loaded, used, saved, and refused in one line."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from tiny_families import (
    CHATML,
    FAMILIES,
    TEXT_FAMILIES,
    TIMM_FAMILIES,
    TORCHVISION_FAMILIES,
    VISION_FAMILIES,
    build_tiny_model,
    write_family,
)
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import render_jinja_template

from chat.text_processor import TextProcessor
from models.loading import is_text_only, load_config, load_model, load_processor
from models.processors import AudioSettings, VideoSettings
from utils import UserError


ROOT = Path(__file__).parent.parent
HERE = [name for name in VISION_FAMILIES if is_torchvision_available() or name not in TORCHVISION_FAMILIES]
needs_no_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model's folder, without weights; the family is the test's parameter."""
    write_family(request.param, tmp_path / "model")
    return tmp_path / "model"


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("folder", [name], indirect=True)


def encode(processor: ProcessorMixin, size: tuple[int, int] | None = (100, 80)) -> BatchFeature:
    """A question and its answer, about an image of one colour unless `size` is None."""
    images = [] if size is None else [{"type": "image"}]
    messages = [
        {"role": "user", "content": [*images, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    special_tokens = processor.tokenizer.special_tokens_map
    text, _ = render_jinja_template([messages], chat_template=processor.chat_template, **special_tokens)
    more = {} if size is None else {"images": [[Image.new("RGB", size, (9, 99, 199))]]}
    return processor(text=text, return_tensors="pt", **more)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("folder", HERE, indirect=True)
def test_a_familys_processor(folder, request):
    """Loaded, it makes what the model takes: as many image tokens as the tower gives features, or forward raises.
    Saved and loaded again, it has the same settings and makes the same tensors."""
    processor = load_processor(str(folder))
    assert type(processor).__name__ == json.loads((folder / "processor_config.json").read_text())["processor_class"]
    assert type(processor.image_processor).__name__.endswith("Pil") or request.node.callspec.id in TORCHVISION_FAMILIES
    batch = encode(processor)
    assert "pixel_values" in batch
    if request.node.callspec.id not in TIMM_FAMILIES:
        config = load_config(str(folder))
        floats = {name: tensor.float() for name, tensor in batch.items() if tensor.is_floating_point()}  # of bfloat16
        with torch.no_grad():
            logits = build_tiny_model(config).eval()(**{**batch, **floats}).logits
        assert logits.shape[1] == batch["input_ids"].shape[1]

    processor.save_pretrained(folder.parent / "saved")
    shutil.copy(folder / "config.json", folder.parent / "saved")
    again = load_processor(str(folder.parent / "saved"))
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    encoded = encode(again)
    assert encoded.keys() == batch.keys()
    assert all(torch.equal(encoded[name], batch[name]) for name in batch)


@pytest.mark.parametrize("folder", TEXT_FAMILIES, indirect=True)
def test_a_text_only_models_tokenizer_is_its_processor(folder):
    """It is saved as a tokenizer, which loads by itself, and refuses images."""
    assert is_text_only(load_config(str(folder)))
    processor = load_processor(str(folder))
    assert type(processor) is TextProcessor and processor.chat_template == CHATML
    ids = encode(processor, size=None)["input_ids"]
    assert processor.tokenizer.decode(ids[0]).endswith("A cat.<|im_end|>\n")
    with pytest.raises(ValueError, match="reads text only"):
        encode(processor)

    processor.save_pretrained(folder.parent / "saved")
    assert not (folder.parent / "saved/processor_config.json").exists()
    saved = AutoTokenizer.from_pretrained(folder.parent / "saved")
    assert saved.chat_template == CHATML and saved.get_vocab() == processor.tokenizer.get_vocab()


def test_families():
    """As many as the table of the README promises, and all of them of the kind that they are listed as."""
    assert len(VISION_FAMILIES) >= 25
    for name, config in FAMILIES.items():
        assert is_text_only(config()) == (name in TEXT_FAMILIES), name


@of("gemma3_text")
def test_a_text_model_whose_tokenizer_names_a_vision_models_processor(folder):
    """As Gemma 3 1B's does."""
    edit_json(folder / "tokenizer_config.json", processor_class="Gemma3Processor")
    assert type(load_processor(str(folder))) is TextProcessor


@needs_no_torchvision
@of("qwen2_vl")
def test_video_settings_are_kept(folder):
    """Nested in processor_config.json, and in a file of their own, as older folders have them."""
    settings = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3, "min_frames": 4, "something": [1, 2]}
    edit_json(folder / "processor_config.json", video_processor=settings)
    saved = folder.parent / "saved"
    for _ in ("nested", "of their own"):
        processor = load_processor(str(folder))
        assert type(processor.video_processor) is VideoSettings and processor.video_processor.fps == 3
        processor.save_pretrained(saved)
        assert json.loads((saved / "processor_config.json").read_text())["video_processor"] == settings
        edit_json(folder / "processor_config.json", video_processor=None)
        edit_json(folder / "video_preprocessor_config.json", **settings)
    with pytest.raises(ImportError, match="pip install torchvision"):
        processor(text="<|video_pad|>", videos=[torch.zeros(4, 3, 28, 28)])


@of("qwen2_vl")
def test_a_folder_of_the_older_form(folder):
    """preprocessor_config.json holds the image settings and names the processor; its image processor's old name, or
    the one of the torchvision form, gives the PIL one."""
    nested = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    expected = nested["image_processor"]
    for old_name in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"):
        settings = expected | {"image_processor_type": old_name, "processor_class": "Qwen2VLProcessor"}
        edit_json(folder / "preprocessor_config.json", **settings)
        processor = load_processor(str(folder))
        assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
        assert json.loads(processor.image_processor.to_json_string()) == expected
        assert processor.chat_template


@of("llava")
def test_pixels_do_not_depend_on_torchvision(folder):
    """The image processor on PIL is asked for, whatever is installed."""
    with patch.object(AutoImageProcessor, "from_pretrained", wraps=AutoImageProcessor.from_pretrained) as asked:
        load_processor(str(folder))
    assert [call.kwargs["backend"] for call in asked.call_args_list] == ["pil"]


@of("llava")
def test_the_processor_of_an_adapters_folder(folder):
    """It holds what a run saves beside an adapter: no config.json."""
    (folder / "config.json").unlink()
    assert encode(load_processor(str(folder)))["pixel_values"].shape == (1, 3, 56, 56)


@of("gemma4")
def test_missing_audio_settings_do_not_matter(folder):
    """Gemma 4's processor has a part for audio, and a training without audio does not need it."""
    processor = load_processor(str(folder))
    assert type(processor.feature_extractor).__name__ == "Gemma4AudioFeatureExtractor"
    settings = {"feature_extractor_type": "OfAPackageThatIsMissing", "sampling_rate": 7}
    edit_json(folder / "processor_config.json", feature_extractor=settings)
    processor = load_processor(str(folder))
    assert type(processor.feature_extractor) is AudioSettings
    assert "pixel_values" in encode(processor)
    assert processor.to_dict()["feature_extractor"] == settings


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_an_audio_encoder_does_not_stand_in_the_way(attn_implementation, tmp_path):
    """Gemma 4's knows eager attention only, and no image needs it: the flag is for the other parts."""
    write_family("gemma4_audio", tmp_path, with_weights=True)
    loaded = load_model(str(tmp_path), torch.float32, attn_implementation)
    with torch.device("meta"):
        made = load_model(str(tmp_path), torch.float32, attn_implementation)
    for model in (loaded, made):
        parts = (model.get_decoder(), model.get_encoder("image"), model.model.audio_tower)
        found = [part.config._attn_implementation for part in parts]
        assert found == [attn_implementation, attn_implementation, "eager"]


@of("paligemma")
def test_paligemma_has_a_template_although_its_folder_has_none(folder):
    processor = load_processor(str(folder))
    assert not (folder / "chat_template.jinja").exists()
    text = processor.tokenizer.decode(encode(processor)["input_ids"][0])
    assert text.replace("<image>", "") == "<s>What?\nA cat.</s>\n", "bos and the last line break are the processor's"


@of("llama")
def test_a_tokenizer_without_a_padding_token_gets_one(folder):
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    assert load_processor(str(folder)).tokenizer.pad_token == "<unk>"


@of("llava")
def test_a_template_of_several(folder):
    """The one named default is taken."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("another")
    assert load_processor(str(folder)).chat_template == template


@needs_no_torchvision
@pytest.mark.parametrize("folder", TORCHVISION_FAMILIES, indirect=True)
def test_an_image_processor_for_torchvision_alone(folder):
    with pytest.raises(UserError, match="its image processor needs torchvision, pip install torchvision"):
        load_processor(str(folder))


def test_mgms_processor_is_the_one_that_transformers_loads():
    """The same pixels and tokens, to the bit."""
    from transformers import AutoProcessor

    folder = ROOT / "data/tiny_mgm"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    image = Image.effect_mandelbrot((100, 80), (-2, -2, 2, 2), 50).convert("RGB")
    ours, theirs = load_processor(str(folder)), AutoProcessor.from_pretrained(folder, backend="pil")
    batches = [processor(conversations=[turns], images=[[image]]) for processor in (ours, theirs)]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert ours.to_dict() == theirs.to_dict()


REFUSED = {
    "no chat template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "it has no chat template; take the model's instruction-tuned form",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"its tokenizer cannot be loaded \(.*; tokenizer.json and tokenizer_config.json must be beside config.json\)",
    ),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "its tokenizer cannot be loaded",
    ),
    "a tokenizer alone": (
        lambda folder: (folder / "processor_config.json").unlink(),
        r"there are no image settings in it \(processor_config.json or preprocessor_config.json\)",
    ),
    "no processor that transformers knows": (
        lambda folder: (
            (folder / "processor_config.json").unlink()
            or edit_json(folder / "config.json", model_type="mistral4", vision_config=None, text_config=None)
            or edit_json(folder / "tokenizer_config.json", processor_class=None)
        ),
        "there is no processor in it that transformers knows",
    ),
    "a broken processor": (
        lambda folder: (folder / "processor_config.json").write_text("{"),
        "cannot be loaded .*not a valid JSON file",
    ),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[1]"), "cannot be loaded"),
    "no config": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "there is no config.json in it"),
    "no model type": (lambda folder: edit_json(folder / "config.json", model_type=None), "has no model_type"),
    "an unknown model type": (
        lambda folder: edit_json(folder / "config.json", model_type="llava_9"),
        r"transformers \d+\.\d+\.\d+ has no model of the type llava_9$",
    ),
    "remote code": (
        lambda folder: edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        r"has no model of the type own, and code that comes with a model \(auto_map\) is not run",
    ),
    "a model that writes no text": (
        lambda folder: edit_json(folder / "config.json", model_type="clip_vision_model"),
        "no vision-language model and no causal language model of the type clip_vision_model",
    ),
    "a processor's own code": (
        lambda folder: edit_json(
            folder / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Own"}
        ),
        None,
    ),
}


@of("llava")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_in_one_line(folder, case):
    """The line names the model."""
    change, words = REFUSED[case]
    change(folder)
    if words is None:  # the family's own processor is taken, and no code is run
        assert type(load_processor(str(folder))).__name__ == "LlavaProcessor"
        return
    with pytest.raises(UserError, match=words) as refused:
        load_processor(str(folder))
    assert str(refused.value).startswith(f"--model {folder}: ") and "\n" not in str(refused.value)
