"""A family's own processor, also where packages are missing that images do not need.

Where transformers has an image processor on PIL, that one is taken, with and without torchvision: the two give
different pixels, and a result must not depend on an optional package. A video processor needs torchvision. Without it
the folder's video settings are kept and saved again, so that a saved folder loads elsewhere with everything.
"""

import importlib
import sys
from typing import Any

import transformers
from transformers import (
    PROCESSOR_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.models.auto.feature_extraction_auto import get_feature_extractor_config
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from models.family import family_of
from utils import UserError, brief_error


FILES = "processor_config.json or preprocessor_config.json"
NO_REMOTE_CODE = {"trust_remote_code": False}  # the default, None, asks a question on the terminal


class VideoSettings(VideoProcessorMixin):
    """Stands where a video processor would, and holds its settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        # ProcessorMixin looks the base class up by name and finds none without torchvision, although it needs none.
        transformers.VideoProcessorMixin = VideoProcessorMixin

    def __getattr__(self, name: str) -> Any:
        if name != "settings" and name in self.settings:  # a copy has no settings yet when it is asked for methods
            return self.settings[name]
        raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def preprocess(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("videos need torchvision: pip install torchvision")


class AudioSettings(FeatureExtractionMixin):
    """Stands where a feature extractor would whose packages are missing, and holds its settings."""

    model_input_names = ["input_features"]

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{self.settings.get('feature_extractor_type')} needs packages that are not installed")


def read_processor(name: str, config: PreTrainedConfig | None) -> ProcessorMixin:
    """The processor of a folder or a hub id, whose model has this config; None if the folder has no config.

    Raises:
        UserError: there is no processor, or its image processor needs torchvision.
        OSError, ValueError and others: transformers cannot read one of the files.
    """
    chosen = find_class(name, config)
    pieces = [_read_piece(attribute, name, chosen, config) for attribute in chosen.get_attributes()]
    settings, _ = chosen.get_processor_dict(name)
    return chosen.from_args_and_dict(pieces, settings)


def find_class(name: str, config: PreTrainedConfig | None) -> type[ProcessorMixin]:
    """The class that the files name, else the one of the config's family. Raises UserError if there is none."""
    settings = ProcessorMixin.get_processor_dict(name)[0], get_image_processor_config(name), get_tokenizer_config(name)
    class_name = next(filter(None, (found.get("processor_class") for found in settings)), None)
    chosen = processor_class(class_name) if class_name else None
    if chosen is None and type(config) in PROCESSOR_MAPPING:
        chosen = processor_class(PROCESSOR_MAPPING[type(config)].__name__)
    if chosen is None:
        raise UserError(f"--model {name}: there is no processor in it that transformers knows ({FILES})")
    return chosen


def processor_class(name: str) -> type[ProcessorMixin] | None:
    """A processor class by name, also where it asks for a package that images do not need; None if there is none."""
    if name == "PixtralProcessor" and not is_torchvision_available():
        return _pixtral_processor()
    if name == "SmolVLMProcessor":
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        module.num2words = module.num2words or str  # it writes the number of a video's frames
    return processor_class_from_name(name)


def _pixtral_processor() -> type[ProcessorMixin]:
    """It imports one function from the image processor that needs torchvision: the other one has the same function."""
    package = "transformers.models.pixtral"
    missing = f"{package}.image_processing_pixtral"
    sys.modules[missing] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[missing]


def _read_piece(attribute: str, name: str, chosen: type[ProcessorMixin], config: PreTrainedConfig | None) -> Any:
    """One of the parts that a processor is made of."""
    match attribute:
        case "tokenizer":
            is_pixtral = chosen.__name__ == "PixtralProcessor"  # its folders name a tokenizer class that does not fit
            return read_tokenizer(name, PreTrainedTokenizerFast if is_pixtral else AutoTokenizer)
        case "image_processor":
            return _read_image_processor(name, config)
        case "video_processor":
            return _read_video_processor(name)
        case "feature_extractor":
            return _read_feature_extractor(name)
    raise UserError(f"--model {name}: {chosen.__name__} needs a {attribute}, which is not supported")


def read_tokenizer(name: str, tokenizer_class: type = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id, which can pad. Raises UserError if it has no tokenizer.json."""
    # Mistral's own tokenizer, which is taken where mistral-common is installed, knows no offsets.
    auto = {"mistral_format": False, **NO_REMOTE_CODE} if tokenizer_class is AutoTokenizer else {}
    try:
        tokenizer = tokenizer_class.from_pretrained(name, **auto)
    except (OSError, ValueError, ImportError) as error:
        reason = f"{brief_error(error)}; tokenizer.json and tokenizer_config.json must be beside config.json"
        raise UserError(f"--model {name}: its tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"--model {name}: its tokenizer has no tokenizer.json, and no other kind is supported")
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _read_image_processor(name: str, config: PreTrainedConfig | None) -> Any:
    if not get_image_processor_config(name):
        raise UserError(f"--model {name}: there are no image settings in it ({FILES})")
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil", config=config, **NO_REMOTE_CODE)
    except (ValueError, ImportError) as error:
        if is_torchvision_available() or "torchvision" not in str(error):
            raise
        raise UserError(f"--model {name}: its image processor needs torchvision, pip install torchvision") from None


def _read_video_processor(name: str) -> VideoProcessorMixin:
    try:
        return AutoVideoProcessor.from_pretrained(name, **NO_REMOTE_CODE)
    except (ImportError, OSError, ValueError):  # without torchvision, or without settings that it could take
        return VideoSettings(get_video_processor_config(name))


def _read_feature_extractor(name: str) -> FeatureExtractionMixin:
    try:
        return AutoFeatureExtractor.from_pretrained(name, **NO_REMOTE_CODE)
    except (ImportError, OSError, ValueError):
        return AudioSettings(get_feature_extractor_config(name))


def give_chat_template(name: str, processor: ProcessorMixin, config: PreTrainedConfig | None) -> None:
    """Give the processor its tokenizer's chat template, or its family's, if it has none itself.

    Raises UserError if there is none.
    """
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    processor.chat_template = found or (family_of(config).chat_template if config is not None else None)
    if processor.chat_template is None:
        raise UserError(
            f"--model {name}: it has no chat template; take the model's instruction-tuned form, or write a "
            "chat_template.jinja into its folder"
        )
