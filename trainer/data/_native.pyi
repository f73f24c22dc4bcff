"""JPEGs by libjpeg-turbo, and tars (_native.c). No function keeps anything: call them from any thread."""

import numpy as np

Encoded = bytes | bytearray | memoryview

def header(encoded: Encoded, /) -> tuple[int, int, bool] | None:
    """Width and height, pixels as stored, and whether ``decode_crop`` takes this kind: baseline or progressive, 8 bits, grey
    or YCbCr. None for what is no JPEG. Reads nothing behind the first scan's header."""

def decode_crop(
    encoded: Encoded, box: tuple[int, int, int, int], out: np.ndarray, flip: bool, /
) -> None:
    """The ``box`` (left, top, width, height; pixels as stored) of a JPEG, resized and, with ``flip``, mirrored.

    ``out``: uint8 [size, size, 3], contiguous, size at most 16,384; holds anything after an error. Raises ValueError for
    what Pillow should judge: another kind, a box that is not inside the image, a cut or corrupt file. The interpreter lock
    is not held.
    """

def members(content: Encoded, /) -> list[tuple[str, int, int]] | None:
    """Names of the files in a stretch of tar, and where the bytes of each begin and end. None unless it is whole and holds
    nothing but plain files whose ASCII names fit their headers."""
