"""Sizes of images, and images of at most so many pixels."""

from PIL import Image


Size = tuple[int, int]  # width and height in pixels
GREY = (127, 127, 127)
PHOTO: Size = (640, 480)  # a size for images of which none is known


def blank_image(size: Size) -> Image.Image:
    return Image.new("RGB", size, GREY)


def shrunk_size(size: Size, max_pixels: int) -> Size:
    """The size of an image of at most `max_pixels`, the aspect kept. 0: no limit."""
    width, height = size
    if max_pixels == 0 or width * height <= max_pixels:
        return size
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, int(width * scale)), max(1, int(height * scale))


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image with at most `max_pixels`, by a filter that averages. 0: as it is."""
    size = shrunk_size(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
