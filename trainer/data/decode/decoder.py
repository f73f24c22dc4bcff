"""Encoded image bytes to pixels."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from trainer.data.decode.image_formats import MAX_PIXELS, ImageFault, open_supported

try:
    from trainer.data import _native
except ImportError:  # it was not built: no compiler, or no libjpeg-turbo
    _native = None  # type: ignore[assignment]

Box = tuple[int, int, int, int]
"""Left, top, width, height; pixels of the image as it is stored."""

Choose = Callable[[int, int], Box]
"""Width and height of an image to the box that is wanted of it. Pure: it may be asked twice."""


class DecodeError(ValueError):
    """These bytes are no image that can be decoded whole."""


def decoder_in_use() -> str:
    """What ``decode_crop`` decodes JPEGs with, for people: one line."""
    if _native is None:
        return "Pillow, which is slower: the native decoder was not built (it needs gcc, python3-dev and libjpeg-dev)"
    return "native, by libjpeg-turbo: of a JPEG only what its crop needs"


def decode_rgb(encoded: bytes | memoryview) -> Image.Image:
    """Decode to RGB, size as stored, EXIF's orientation ignored as torchvision's ImageFolder does.

    Raises DecodeError for what is not an image of a supported format, is truncated, or is a
    decompression bomb (more than MAX_PIXELS, not decoded).
    """
    try:
        image = open_supported(encoded)
        if image.mode == "RGB":
            image.load()
            return image
        return image.convert("RGB")  # decodes; grey and CMYK too
    except MemoryError:
        raise
    except ImageFault as error:
        raise DecodeError(str(error)) from None
    # Pillow's readers raise what their parsing stumbles over: struct.error, IndexError, ...
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def decode_crop(encoded: bytes | memoryview, choose: Choose, out: np.ndarray, flip: bool) -> None:
    """Decode the box that ``choose`` wants, resized (bilinear, antialiased) and, with ``flip``,
    mirrored, into ``out``.

    ``out``: uint8 [size, size, 3], contiguous, as a place in a batch is; holds anything after an
    error. The result is Pillow's ``crop(box).resize((size, size), BILINEAR)`` to two grey levels
    (mean 0.15); of a JPEG, a box four times as large as ``out`` or more is decoded at a reduced
    scale that leaves it twice as large or more (mean 0.4, single pixels 10). Raises DecodeError as
    ``decode_rgb`` does, but corruption below the box may not be seen; ValueError for a box that is
    not inside the image.
    """
    if _native is not None and (found := _native.header(encoded)):
        width, height, plain = found
        _refuse_bomb(width, height)
        if plain:
            box = _inside(choose(width, height), width, height)
            with suppress(
                ValueError
            ):  # what is cut or corrupt, Pillow judges: the verdict is the same with and without us
                _native.decode_crop(encoded, box, out, flip)
                return
    crop_by_pillow(encoded, choose, out, flip)


def crop_by_pillow(
    encoded: bytes | memoryview, choose: Choose, out: np.ndarray, flip: bool
) -> None:
    """``decode_crop`` without native code, for every kind of image."""
    image = decode_rgb(encoded)
    left, top, width, height = _inside(choose(*image.size), *image.size)
    size = (out.shape[1], out.shape[0])
    image = image.crop((left, top, left + width, top + height)).resize(
        size, Image.Resampling.BILINEAR
    )
    out[...] = to_array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3]."""
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
