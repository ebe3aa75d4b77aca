"""A family's own processor, with or without torchvision."""

import importlib
import sys
from typing import Any
from unittest import mock

import transformers
from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin


class VideoSettings(VideoProcessorMixin):
    """The settings of a video processor, which needs torchvision: kept, and written back by save_pretrained."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        # ProcessorMixin looks the base class up by name and finds none without torchvision, although it needs none.
        transformers.VideoProcessorMixin = VideoProcessorMixin

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def preprocess(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("videos need torchvision: pip install torchvision")


def processor_class(name: str) -> type[ProcessorMixin]:
    """A processor class of transformers, also where it asks for a package that images do not need."""
    if name == "PixtralProcessor" and not is_torchvision_available():
        return _pixtral_processor()
    if name == "SmolVLMProcessor":
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        module.num2words = module.num2words or str  # it writes the number of a video's frames
    return getattr(transformers, name)


def _pixtral_processor() -> type[ProcessorMixin]:
    """It imports one function from the image processor that needs torchvision: the other one has the same function."""
    package = "transformers.models.pixtral"
    instead = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {f"{package}.image_processing_pixtral": instead}):
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
