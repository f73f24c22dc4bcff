"""Encoded image bytes to pixels."""

import io

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
