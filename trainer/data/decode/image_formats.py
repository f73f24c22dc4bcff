"""The supported image formats: identifies encoded bytes, detects truncation, opens with Pillow.

Pillow can open more than 40 formats, and some of its readers run other programs (EPS starts
Ghostscript) or raise arbitrary exceptions. Everything here opens only `FORMATS`.
"""

import io
import struct
from collections.abc import Callable

from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "MAX_PIXELS",
    "ImageFault",
    "PngWithoutEnd",
    "describe",
    "identify",
    "open_supported",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Names for Pillow's ``formats`` argument; "JPEG" also opens MPO and MPO-like JPEGs."""

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "GIF": "gif",
}
"""File extension in a shard for each format that ``open_supported`` returns."""

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded; above it, Pillow raises DecompressionBombError too.
"""

Read = Callable[[int, int], bytes]
"""``read(start, end)`` returns those bytes of an encoded image; fewer at its end."""

_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # imported so that Pillow does not import all 40
_HEAD = 8192  # bytes; contains the headers of nearly all JPEGs and PNGs
_TAIL = 512  # bytes; contains the end marker unless more garbage follows it
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_EOI = b"\xff\xd9"

_OTHER_KINDS = (
    (b"DDS ", "a DDS texture"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "a Windows icon"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"v/1\1", "an OpenEXR image"),
    (b"qoif", "a QOI image"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x93NUMPY", "a NumPy array"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)


class ImageFault(ValueError):
    """Raised for bytes that are not a supported, complete image; the message is the reason."""


class PngWithoutEnd(ImageFault):
    """Raised for a PNG without its IEND chunk.

    Only decoding can tell whether its pixels are complete.
    """


def open_supported(encoded: bytes | memoryview) -> Image.Image:
    """Opens an image of a supported format; the pixels are not decoded yet.

    Raises ImageFault with the reason: another format, unreadable, or more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except MemoryError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise ImageFault(str(error) if bomb else describe(bytes(encoded[:_HEAD]))) from None
    except Exception as error:  # Pillow's parsers raise arbitrary exceptions on corrupt data
        raise ImageFault(f"cannot be read: {error or type(error).__name__}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageFault(f"{width:,} x {height:,} pixels: decompression bombs are refused")
    return image


def identify(read: Read, size: int) -> str:
    """Returns the format's file extension after checking that the encoded image is complete.

    JPEG and PNG are checked by their header and end marker, WebP by its header and the length in
    it, without decoding; bytes after the end are allowed. The other formats have no reliable end
    marker and are decoded.

    Raises PngWithoutEnd if only that chunk is missing, otherwise ImageFault with the reason.
    ``read`` may raise OSError.
    """
    if size == 0:
        raise ImageFault("empty")
    head = read(0, _HEAD)
    if head.startswith(_JPEG):
        extension = EXTENSIONS["JPEG"]
        if fault := _jpeg_fault(read, head, size):
            raise ImageFault(fault)
    elif head.startswith(_PNG):
        extension = EXTENSIONS["PNG"]
    else:
        return _identify_whole(read(0, size))
    if len(head) < size:
        try:
            open_supported(head)
        except ImageFault:  # headers longer than most
            open_supported(read(0, size))
    else:
        open_supported(head)
    if extension == EXTENSIONS["PNG"] and not _png_has_end(read, size):
        raise PngWithoutEnd("its IEND chunk is missing: it may be truncated")
    return extension


def _identify_whole(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        needed = struct.unpack_from("<I", content, 4)[0] + 8
        if needed > len(content):
            raise ImageFault(
                f"truncated: its header says {needed:,} bytes, but it has {len(content):,}"
            )
        open_supported(content)
        return EXTENSIONS["WEBP"]
    image = open_supported(content)
    try:
        image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageFault(f"cannot be decoded: {error or type(error).__name__}") from None
    if image.format == "GIF" and (fault := _gif_fault(content)):
        raise ImageFault(fault)
    return EXTENSIONS[str(image.format)]


def _jpeg_fault(read: Read, head: bytes, size: int) -> str | None:
    """Looks for the end-of-image marker after the first scan's header.

    Entropy-coded data cannot contain FF D9, but a thumbnail before the first scan does.
    """
    position = 2
    while True:
        segment = head[position : position + 4]
        if len(segment) < 4:
            segment = read(position, position + 4)
        if len(segment) < 4:
            return "truncated: it ends within the header"
        marker = segment[1]
        if segment[0] != 0xFF:
            position += 1  # padding or garbage between segments, which libjpeg skips too
        elif marker == 0xDA:
            break
        elif marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
        elif marker == 0xD9:
            return "truncated: it holds no image data"
        else:
            position += 2 + max(2, segment[2] << 8 | segment[3])
    start = max(position, size - _TAIL)
    if _EOI in read(start, size) or (start > position and _EOI in read(position, size)):
        return None
    return "truncated: the end-of-image marker is missing"


def _png_has_end(read: Read, size: int) -> bool:
    if _IEND in read(max(8, size - _TAIL), size):
        return True
    position = 8
    while len(head := read(position, position + 8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        position += 12 + length
        if kind == b"IEND" and position <= size:
            return True
    return False


def _gif_fault(content: bytes) -> str | None:
    """Checks that every block of a GIF is complete. A missing trailer alone is harmless."""
    truncated = "truncated: it ends within a frame"

    def table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    position = 13 + table(content[10])
    while position < len(content) and content[position] in b"\x21\x2c":
        if content[position] == 0x21:
            position += 2
        elif position + 10 > len(content):
            return truncated
        else:
            position += 11 + table(content[position + 9])
        while position < len(content) and content[position]:
            position += 1 + content[position]
        if position >= len(content):
            return truncated
        position += 1
    return None


def describe(head: bytes) -> str:
    """Describes what unsupported bytes seem to be, and how to fix it."""
    text = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer, not the image; run `git lfs pull` in its repository"
    if b"annex/objects/" in head[:200]:
        return "a git-annex pointer, not the image; run `git annex get` in its repository"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image; download it again"
    if b"<svg" in text:
        return _unsupported("an SVG drawing")
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return _unsupported(f"an {_BRANDS[head[8:12]]} image".replace("an HEIC", "a HEIC"))
    for magic, kind in _OTHER_KINDS:
        if head.startswith(magic):
            return _unsupported(kind)
    if head.startswith((_JPEG, _PNG, b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return "corrupt: its header cannot be read"
    if head and not head.strip(b"\0"):
        return "not an image: it contains only zero bytes"
    return "not an image"


def _unsupported(kind: str) -> str:
    return f"{kind}, which is not supported; convert it to JPEG or PNG"
