"""Encoded image bytes to pixels."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError


class DecodeError(ValueError):
    """These bytes are no image that can be decoded whole."""


def decode_rgb(encoded: bytes | memoryview) -> Image.Image:
    """Decode to RGB, size as stored. Raises DecodeError for what is no image, is cut, or is a decompression bomb."""
    try:
        image = Image.open(io.BytesIO(encoded))
        return image.convert("RGB")  # decodes; grey and CMYK too
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(image, dtype=np.uint8)


def decode_crop(
    encoded: bytes | memoryview, choose: Callable[[int, int], tuple[int, int, int, int]], out: np.ndarray, flip: bool = False
) -> None:
    image = decode_rgb(encoded)
    left, top, w, h = choose(*image.size)
    size = len(out)
    view = np.asarray(image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR))
    out[:] = view[:, ::-1] if flip else view
