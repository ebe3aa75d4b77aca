"""Images to RGB, and what can be wrong with them."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from utils import UserError, brief_error


MAX_ASPECT_RATIO = 100  # scaled so that the short side fits the tower, a longer strip would take gigabytes


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever goes wrong with an image becomes a UserError that starts with `where`. Huge images are refused too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{where} cannot be decoded ({brief_error(error)}); replace or remove it") from None


def open_image(image_folder: Path, name: str, record_id: str) -> Image.Image:
    """Decode an image to RGB. EXIF rotation is left alone, as in the original.

    Raises:
        UserError: it is missing, truncated, too large, no image, or a link out of the folder.
    """
    path = image_folder / name
    where = f"record {record_id}: image {path}"
    with naming(where):
        if not path.resolve().is_relative_to(image_folder.resolve()):
            raise UserError(f"{where} leaves the image folder; use files inside it")
        return read_rgb(path)


def open_embedded(content: bytes, name: str, record_id: str) -> Image.Image:
    """Decode an image's file content to RGB, with the checks of `open_image`."""
    with naming(f"record {record_id}: image {name}"):
        return read_rgb(io.BytesIO(content))


def read_rgb(file: Path | BinaryIO) -> Image.Image:
    """The (first) image in the file; whatever its mode, RGB. Transparency is dropped, as in the original."""
    with Image.open(file) as image:
        check_size(*image.size)
        if image.mode.startswith("I;16"):  # convert would make white of everything above 255
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a size that is small as it is but not once it is padded or scaled to a square."""
    long, short = max(width, height), min(width, height)
    if long**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels: as a square it would have {long**2:,}; scale it down")
    if long > MAX_ASPECT_RATIO * short:
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
