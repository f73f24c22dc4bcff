"""Native JPEG decoding with libjpeg-turbo and tar parsing (_native.c).

The functions keep no state and can be called from any thread.
"""

import numpy as np

Encoded = bytes | bytearray | memoryview

def header(encoded: Encoded, /) -> tuple[int, int, bool] | None:
    """Returns width and height (pixels as stored) and whether ``decode_crop`` supports the JPEG.

    Supported are baseline and progressive JPEGs of 8 bits, gray or YCbCr. Returns None if the bytes
    are not a JPEG. Reads nothing after the first scan's header.
    """

def decode_crop(
    encoded: Encoded, box: tuple[int, int, int, int], out: np.ndarray, flip: bool, /
) -> None:
    """Decodes the ``box`` of a JPEG, resizes it into ``out`` and optionally mirrors it.

    ``box``: left, top, width, height, in pixels as stored. ``out``: uint8 [size, size, 3],
    contiguous, size at most 16,384; its content is undefined after an error. ``flip``: mirror
    horizontally.

    Raises ValueError if the caller should fall back to Pillow: an unsupported kind of JPEG, a box
    that is not inside the image, a truncated or corrupt file. Releases the GIL.
    """

def members(content: Encoded, /) -> list[tuple[str, int, int]] | None:
    """Returns the name and the data's [first byte, end) of each file in a byte range of a tar.

    Returns None unless the range is complete and contains only plain files whose ASCII names fit
    their headers.
    """
