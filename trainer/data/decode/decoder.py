"""Decodes encoded image bytes to pixels."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from trainer.data.decode.image_formats import MAX_PIXELS, ImageFault, open_supported

try:
    from trainer.data import _native
except ImportError:  # not built: no compiler, or no libjpeg-turbo
    _native = None  # type: ignore[assignment]

Box = tuple[int, int, int, int]
"""Left, top, width, height, in pixels of the image as stored."""

Choose = Callable[[int, int], Box]
"""Returns the box to crop from an image of a given width and height.

Must be pure: it may be called twice for one image.
"""


class DecodeError(ValueError):
    """Raised for bytes that cannot be completely decoded as an image."""


def decoder_in_use() -> str:
    """Describes in one line, for people, how ``decode_crop`` decodes JPEGs."""
    if _native is None:
        return (
            "Pillow, which is slower: the native decoder was not built (it needs gcc, "
            "python3-dev and libjpeg-dev)"
        )
    return "native (libjpeg-turbo); only the part of a JPEG that the crop needs is decoded"


def decode_rgb(encoded: bytes | memoryview) -> Image.Image:
    """Decodes an image to RGB in its stored size.

    The EXIF orientation is ignored, as in torchvision's ImageFolder. Raises DecodeError if the
    bytes are not an image of a supported format, are truncated, or are a decompression bomb (more
    than MAX_PIXELS; it is not decoded).
    """
    try:
        image = open_supported(encoded)
        if image.mode == "RGB":
            image.load()
            return image
        return image.convert("RGB")  # decodes; handles gray and CMYK
    except MemoryError:
        raise
    except ImageFault as error:
        raise DecodeError(str(error)) from None
    # Pillow's parsers raise arbitrary exceptions on corrupt data: struct.error, IndexError, ...
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def decode_crop(encoded: bytes | memoryview, choose: Choose, out: np.ndarray, flip: bool) -> None:
    """Decodes the box that ``choose`` returns, resizes it into ``out`` and optionally mirrors it.

    The resize is bilinear and antialiased; ``flip`` mirrors the result horizontally. ``out``: uint8
    [size, size, 3], contiguous, such as a slot of a batch; its content is undefined after an error.

    The result equals Pillow's ``crop(box).resize((size, size), BILINEAR)`` to within two gray
    levels (mean 0.15). If the box of a JPEG is at least four times as large as ``out``, it is
    decoded at a reduced scale that leaves it at least twice as large (mean error 0.4, single pixels
    10).

    Raises DecodeError as ``decode_rgb`` does, but corruption below the box may go undetected.
    Raises ValueError if the box is not inside the image.
    """
    if _native is not None and (found := _native.header(encoded)):
        width, height, plain = found
        _refuse_bomb(width, height)
        if plain:
            box = _inside(choose(width, height), width, height)
            # Truncated or corrupt files fall through to Pillow, so that a file is accepted or
            # rejected alike with and without the native decoder.
            with suppress(ValueError):
                _native.decode_crop(encoded, box, out, flip)
                return
    crop_by_pillow(encoded, choose, out, flip)


def crop_by_pillow(
    encoded: bytes | memoryview, choose: Choose, out: np.ndarray, flip: bool
) -> None:
    """Implements ``decode_crop`` without native code, for all image formats."""
    image = decode_rgb(encoded)
    left, top, width, height = _inside(choose(*image.size), *image.size)
    size = (out.shape[1], out.shape[0])
    image = image.crop((left, top, left + width, top + height)).resize(
        size, Image.Resampling.BILINEAR
    )
    out[...] = to_array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image as uint8 [height, width, 3]."""
    return np.asarray(image, dtype=np.uint8)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width:,} x {height:,} pixels: decompression bombs are refused")


def _inside(box: Box, width: int, height: int) -> Box:
    left, top, box_width, box_height = box
    if (
        left < 0
        or top < 0
        or box_width < 1
        or box_height < 1
        or left + box_width > width
        or top + box_height > height
    ):
        raise ValueError(f"box {box} is not inside an image of {width} x {height}")
    return box
