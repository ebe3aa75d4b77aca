"""Find image files, decode them to RGB, and say what is wrong with those that cannot be used."""

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from utils import UserError, brief_error


WHITE_IS_ZERO = 0  # a TIFF's photometric interpretation; Pillow inverts images of 8 bits only
LEAVES = "leaves the image folder by a link; to allow such links, give --follow_links"
MOVED = "images found where MGM's own loader looks for them: ocr_vqa as .png, vg/VG_100K as vg/images"
MAX_ASPECT_RATIO = 100  # scaled so that the short side fits the tower, a longer strip would take gigabytes
T = TypeVar("T")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn any error of an image into a UserError that starts with `where`. Huge images are refused too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise anything
        raise UserError(f"{where} cannot be decoded ({brief_error(error)}); replace or remove it") from None


def path_of(image_folder: Path, name: str) -> str:
    """The path of an image. As in MGM's own loader, OCR-VQA's may be .png, and Visual Genome's all in one `images`.

    MGM's instruction file names `ocr_vqa/images/N.jpg` and `vg/VG_100K/N.jpg` (or `VG_100K_2`).
    """
    path = os.path.join(image_folder, name)  # several times faster than pathlib
    if "ocr" in name:
        other = name.replace(".jpg", ".png")
    elif "VG_100K" in name:
        other = re.sub("VG_100K(_2)?", "images", name)
    else:
        return path
    other = os.path.join(image_folder, other)
    return other if os.path.lexists(other) and not os.path.lexists(path) else path


class ImageLookup:
    """Checks a folder's image files without opening them: millions of names take seconds.

    Args:
        follow_links: allow links out of the folder.
    """

    num_moved = 0  # images found where MGM's own loader looks, not where their record says

    def __init__(self, image_folder: Path, follow_links: bool) -> None:
        self.folder, self.follow_links = image_folder, follow_links
        self.real_folder = os.path.realpath(image_folder)
        self._is_inside = functools.cache(self._resolves_inside)  # of folders: few, and asked for often

    def problem(self, name: str) -> str | None:
        path = path_of(self.folder, name)
        self.num_moved += path != os.path.join(self.folder, name)
        if not os.path.isfile(path):
            return f"no image {path}; is --image_folder right?"
        if self.follow_links:
            return None
        is_inside = self._resolves_inside(path) if os.path.islink(path) else self._is_inside(os.path.dirname(path))
        return None if is_inside else f"image {path} {LEAVES}"

    def _resolves_inside(self, path: str) -> bool:
        return os.path.commonpath([self.real_folder, os.path.realpath(path)]) == self.real_folder


def open_image(image_folder: Path, name: str, record_id: str, follow_links: bool = False) -> Image.Image:
    """Decode an image to RGB. EXIF rotation is left alone, as in the original.

    Raises:
        UserError: it is missing, truncated, too large, not an image, or a link out of the folder (unless
            `follow_links`).
    """
    return _read(image_folder, name, record_id, follow_links, read_rgb)


def read_size(image_folder: Path, name: str, record_id: str, follow_links: bool = False) -> tuple[int, int]:
    """Width and height by an image's header. Raises UserError as open_image does, for what the header shows."""
    return _read(image_folder, name, record_id, follow_links, size_of_image)


def _read(image_folder: Path, name: str, record_id: str, follow_links: bool, read: Callable[[Path], T]) -> T:
    """`read(path)` of a record's image. Errors name the record and the image."""
    path = Path(path_of(image_folder, name))
    where = f"record {record_id}: image {path}"
    with naming(where):
        if not follow_links and not path.resolve().is_relative_to(image_folder.resolve()):
            raise UserError(f"{where} {LEAVES}")
        return read(path)


def size_of_image(file: Path | BinaryIO) -> tuple[int, int]:
    """Width and height, by the header alone. Raises ValueError if it is too large."""
    with Image.open(file) as image:
        check_size(*image.size)
        return image.size


def open_embedded(content: bytes, name: str, record_id: str) -> Image.Image:
    """Decode an image's file content to RGB, with the checks of `open_image`."""
    with naming(f"record {record_id}: image {name}"):
        return read_rgb(io.BytesIO(content))


def read_rgb(file: Path | BinaryIO) -> Image.Image:
    """The file's (first) image as RGB. Transparency is dropped, as in the original."""
    with Image.open(file) as image:
        check_size(*image.size)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, scaled from the range of the file's type to 8 bits. Pillow's `convert` would clip deep grey at 255.

    Raises:
        ValueError: the type has no range, or the image uses only a small part of it.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        num_bits = bits_of_deep_grey(image)
        values = np.asarray(image).astype(np.int64)
        check_range(int(values.min()), int(values.max()), num_bits)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
            values = 2**num_bits - 1 - values
        return Image.fromarray((values >> (num_bits - 8)).astype(np.uint8)).convert("RGB")
    has_16_bits = any(";16" in str(tile.args) for tile in getattr(image, "tile", []))  # Pillow keeps the upper 8
    rgb = image.convert("RGB")
    if has_16_bits:
        lows, highs = zip(*rgb.getextrema(), strict=True)
        check_range(min(lows) << 8, max(highs) << 8, 16)
    return rgb


def bits_of_deep_grey(image: Image.Image) -> int:
    """The bits of a grey value. Raises ValueError if the file does not say which value is white."""
    if image.format == "PPM" and image.mode == "I":
        return 16  # the file states its maximum, and Pillow scales by it
    if image.mode.startswith("I;16"):
        return getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,))[0]
    kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
    raise ValueError(f"{kind} values, and nothing says which of them is white: scale it and save it with 8 bits")


def check_range(low: int, high: int, num_bits: int) -> None:
    """Raise ValueError for an image that uses only the lowest quarter of its range, such as 12 bits stored in 16."""
    if low < high < 2**num_bits // 4:
        raise ValueError(
            f"{num_bits} bits a value, but none is above {high}, which is nearly black: "
            "scale it and save it with 8 bits"
        )


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image that is too large once it is padded or scaled to a square."""
    long, short = max(width, height), min(width, height)
    if long**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels: as a square it would have {long**2:,}; scale it down")
    if long > MAX_ASPECT_RATIO * short:
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
