"""MGMProcessor: LLaVA conversations and PIL images to the arguments of MGM's forward."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from layers.chunked_loss import IGNORE_INDEX
from mgm.chat_templates import Span, chat_template_for, render
from mgm.configuration_mgm import MGMConfig
from mgm.label_mask import count_fitting_tokens, find_label_tokens
from mgm.patch_info_mining import split_into_crops


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}


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
            images: a list of PIL images per sample, in the order of their `<image>` placeholders.
            max_length: in tokens, image positions included; later tokens are cut off.
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
        if conversations is not None:
            rows = [self.tokenize(turns, max_length, add_generation_prompt) for turns in conversations]
        else:
            rows = [self._encode(prompt, [], max_length) for prompt in ([text] if isinstance(text, str) else text)]
        images = _one_list_per_sample(images, len(rows))
        for i, (input_ids, _) in enumerate(rows):
            expected = input_ids.count(self.image_token_id) // self.num_image_tokens
            if expected != len(images[i]):
                raise ValueError(f"sample {i} has {expected} {IMAGE_TOKEN} placeholders but {len(images[i])} images")

        data = self._pad(rows, padding_side or self.tokenizer.padding_side)
        if conversations is None:
            del data["labels"]
        views = [self.image_views(image, image_aspect_ratio) for sample in images for image in sample]
        if views:
            data["pixel_values"] = torch.stack([low for low, _ in views])
            data["pixel_values_aux"] = torch.stack([high for _, high in views])
        return BatchFeature(data)

    def tokenize(
        self, conversation: list[dict[str, str]], max_length: int | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """LLaVA turns to (input_ids, labels), image positions expanded. Needs no image: cheap enough to count with."""
        prompts, spans = self.render([conversation], add_generation_prompt)
        return self._encode(prompts[0], spans[0], max_length)

    def render(
        self, conversations: list[list[dict[str, str]]], add_generation_prompt: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        """LLaVA turns to the text that is tokenized, images not expanded, and the characters that carry labels."""
        messages = [to_messages(turns) for turns in conversations]
        return render(messages, self.chat_template, self.tokenizer.special_tokens_map, add_generation_prompt)

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

    def _encode(self, prompt: str, replies: list[Span], max_length: int | None) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of `prompt`, images expanded. `replies`: the characters that carry labels."""
        # verbose=False: a text beyond the tokenizer's maximum is cut or left out later, and reported once.
        encoding = self.tokenizer(prompt, add_special_tokens=False, verbose=False).encodings[0]
        token_ids = encoding.ids  # an image is one token
        num_kept = count_fitting_tokens(token_ids, self.image_token_id, self.num_image_tokens, max_length)
        token_labels = [IGNORE_INDEX] * num_kept
        for index in find_label_tokens(encoding, token_ids, replies, self.image_token_id, num_kept):
            token_labels[index] = token_ids[index]
        input_ids, labels = [], []
        for token_id, label in zip(token_ids[:num_kept], token_labels, strict=True):
            num_positions = self.num_image_tokens if token_id == self.image_token_id else 1
            input_ids += [token_id] * num_positions
            labels += [label] * num_positions
        return input_ids, labels

    def _pad(self, rows: list[tuple[list[int], list[int]]], padding_side: str) -> dict[str, torch.Tensor]:
        length = max(len(input_ids) for input_ids, _ in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            filling = [fill] * (length - len(values))
            return filling + values if padding_side == "left" else values + filling

        columns = {
            "input_ids": [padded(input_ids, self.tokenizer.pad_token_id) for input_ids, _ in rows],
            "attention_mask": [padded([1] * len(input_ids), 0) for input_ids, _ in rows],
            "labels": [padded(labels, IGNORE_INDEX) for _, labels in rows],
        }
        return {name: torch.tensor(values) for name, values in columns.items()}


def to_messages(conversation: list[dict[str, str]]) -> list[dict]:
    """LLaVA turns to transformers' messages. Images move to the front of their message; a first turn by the model is
    dropped, as in the original.

    Raises:
        ValueError: an unknown speaker, two turns in a row by the same speaker, or an image in a reply.
    """
    messages = []
    for turn in conversation:
        role, value = ROLES.get(turn["from"]), turn["value"]
        if role is None:
            remedy = "; move a system turn's text into the first human turn" if turn["from"] == "system" else ""
            raise ValueError(f"a turn is from {turn['from']!r}: expected one of {', '.join(ROLES)}{remedy}")
        if not messages and role == "assistant":
            continue
        if messages and messages[-1]["role"] == role:
            raise ValueError(f"two turns in a row are from {turn['from']!r}: human and gpt must alternate")
        num_images = value.count(IMAGE_TOKEN)
        if num_images and role == "assistant":
            raise ValueError(f"a reply by {turn['from']!r} contains {IMAGE_TOKEN}: images belong to human turns")
        text = value.replace(IMAGE_TOKEN, "").strip() if num_images else value
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    return messages


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
