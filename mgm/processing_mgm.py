"""MGMProcessor: LLaVA conversations and PIL images to the arguments of MGM's forward."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from chat.encoding import encode
from chat.expansion import check_images
from chat.messages import IMAGE_TOKEN, messages_for
from mgm.chat_templates import chat_template_for
from mgm.configuration_mgm import MGMConfig
from mgm.patch_info_mining import split_into_crops


class MGMProcessor(ProcessorMixin):
    """Both views of every image, the turn template, labels.

    Args:
        image_processor: CLIP's, at the auxiliary tower's size (768); the low view is made from its output.
        tokenizer: a fast tokenizer; `<image>` is added to it as id `len(tokenizer)` if it is missing.
        chat_template: how turns are marked; by default as the tokenizer's family does.
        image_size: pixels along one side of the low view (336).
        patch_size: pixels along one side of a CLIP patch (14).
        image_aspect_ratio: `pad` to a square with CLIP's mean colour, or `square`, which crops the middle.
        image_grid: the low view is cut into `image_grid` x `image_grid` crops of `image_size`.
        image_global: the whole image, scaled down to `image_size`, comes after the crops.
    """

    # Of LLaVA's turns: MGM was trained with its images at the front of their message, and without system messages.
    images_first = True
    takes_system = False
    model_sees_dummy_images = True  # where a batch has none and another process's may have some

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_size: int = 336,
        patch_size: int = 14,
        image_aspect_ratio: str = "pad",
        image_grid: int = 1,
        image_global: bool = False,
        **kwargs,
    ) -> None:
        if tokenizer.pad_token is None:  # Llama's; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if IMAGE_TOKEN not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.image_size = image_size
        self.patch_size = patch_size
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid = image_grid
        self.image_global = image_global
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or chat_template_for(tokenizer))

    @property
    def num_image_tokens(self) -> int:
        """Positions of the sequence that one image needs."""
        return (self.image_grid**2 + self.image_global) * (self.image_size // self.patch_size) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_aux", "image_positions"]

    def __call__(
        self,
        images: Sequence | None = None,
        text: str | list[str] | None = None,
        conversations: list[list[dict[str, str]]] | None = None,
        max_length: int | None = None,
        image_aspect_ratio: str | None = None,
        add_generation_prompt: bool = False,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """A batch of LLaVA `conversations` (with labels) or of rendered `text` (without), and its images.

        Args:
            images: a list of PIL images per sample, in the order of their `<image>` placeholders. None in an image's
                place: its positions alone.
            max_length: of conversations, in tokens, image positions included; later tokens are cut off.
            add_generation_prompt: end with the header of the model's turn, for generation.
            padding_side: `right` for training (the tokenizer's default), `left` for generation.

        Returns:
            `input_ids`, `attention_mask` and (for conversations) `labels` [B, T]; `pixel_values` [N, 3, 336, 336] (in
            crops [N, K, 3, 336, 336]) and `pixel_values_aux` [N, 3, 768, 768] over the N images of the batch, absent
            where there are none.

        Raises:
            ValueError: a conversation or its images do not fit together, or `max_length` cuts inside an image.
        """
        if (text is None) == (conversations is None):
            raise ValueError("give exactly one of text and conversations")
        padding_side = padding_side or self.tokenizer.padding_side
        if conversations is not None:
            messages = [messages_for(self, turns) for turns in conversations]
            images = _one_list_per_sample(images, len(messages))
            processor = copy.copy(self)
            processor.image_aspect_ratio = image_aspect_ratio or self.image_aspect_ratio
            return encode(processor, messages, images, max_length, add_generation_prompt, padding_side)
        text = [text] if isinstance(text, str) else list(text)
        images = _one_list_per_sample(images, len(text))
        check_images(self, text, images)
        expanded = [prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens) for prompt in text]
        padding = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        encoded = self.tokenizer(expanded, add_special_tokens=False, **padding)
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        views = [self.image_views(image, image_aspect_ratio) for sample in images for image in sample if image]
        if views:
            data["pixel_values"] = torch.stack([low for low, _ in views])
            data["pixel_values_aux"] = torch.stack([high for _, high in views])
        return BatchFeature(data)

    def tokenize(
        self, conversation: list[dict[str, str]], max_length: int | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """LLaVA turns to (input_ids, labels), image positions expanded. Needs no image."""
        messages = messages_for(self, conversation)
        num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
        row = encode(self, [messages], [[None] * num_images], max_length, add_generation_prompt)
        return row["input_ids"][0].tolist(), row["labels"][0].tolist()

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]], **kwargs) -> dict[str, list[int]]:
        """transformers' way to ask for the tokens of images: here the same for every size."""
        return {"num_image_tokens": [self.num_image_tokens] * len(image_sizes)}

    def image_views(
        self, image: Image.Image, image_aspect_ratio: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One PIL image to its low [3, 336, 336] (in crops [K, 3, 336, 336]) and high [3, 768, 768] view."""
        aspect_ratio = image_aspect_ratio or self.image_aspect_ratio
        if aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(x * 255) for x in self.image_processor.image_mean))
        elif aspect_ratio != "square":
            raise ValueError(f"image_aspect_ratio is {aspect_ratio!r}: choose 'square' or 'pad'")
        high = self._normalized(image)  # [1, 3, S, S]
        return low_views(high, self.image_size, self.image_grid, self.image_global)[0], high[0]

    def _normalized(self, image: Image.Image) -> torch.Tensor:
        """The image processor's pixels [1, 3, S, S], bit for bit, in a third less time: it would make six more arrays
        of the result's size, in fp64."""
        processor = self.image_processor
        pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        return pixels.float().div_(1 / processor.rescale_factor).sub_(mean).div_(std)


def low_views(high: torch.Tensor, image_size: int, image_grid: int, image_global: bool) -> torch.Tensor:
    """CLIP's views of N images from ConvNeXt's [N, 3, S, S]: [N, 3, H, H], in K crops [N, K, 3, H, H].

    They are scaled down without antialiasing, as in the original. The sizes are the config's.
    """
    low = _scaled(high, image_grid * image_size)
    if image_grid == 1:
        return low
    crops = split_into_crops(low, image_grid)
    if image_global:  # scaled from the low view, not from the high one, as in the original
        crops = torch.cat([crops, _scaled(low, image_size).unsqueeze(1)], dim=1)
    return crops


def _scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of the given colour, as large as the image's longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _one_list_per_sample(images: Sequence | None, num_samples: int) -> list[list]:
    """Accept what transformers' processors accept: None, one image, a list for one sample, a list for each sample."""
    if images is None:
        return [[] for _ in range(num_samples)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images or not isinstance(images[0], (list, tuple)):
        images = [list(images)]
    if len(images) != num_samples:
        raise ValueError(f"images are given for {len(images)} samples but there are {num_samples}")
    return [list(sample or []) for sample in images]


def build_processor(
    config: MGMConfig, tokenizer: PreTrainedTokenizerBase, image_aspect_ratio: str = "pad"
) -> MGMProcessor:
    """The processor for a model: CLIP's preprocessing at the auxiliary tower's size."""
    side = config.vision_config_aux.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return MGMProcessor(
        image_processor,
        tokenizer,
        chat_template=chat_template_for(tokenizer, config.text_config.model_type),
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_aspect_ratio=image_aspect_ratio,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )


AutoProcessor.register(MGMConfig, MGMProcessor)
