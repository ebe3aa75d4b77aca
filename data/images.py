"""Images to RGB, and what can be wrong with them."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from utils import UserError, brief_error


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
    with Image.open(file) as image:
        return image.convert("RGB")
