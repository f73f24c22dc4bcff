"""Which images are supported and complete, against Pillow's own decoding."""

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import NOT_SUPPORTED, encode, jpeg, pixels, png

from trainer.data.decode.image_formats import (
    EXTENSIONS,
    MAX_PIXELS,
    ImageFault,
    identify,
    open_supported,
)


def identified(content: bytes) -> str:
    return identify(lambda start, end: content[start:end], len(content))


def fault_of(content: bytes) -> str:
    with pytest.raises(ImageFault) as caught:
        identified(content)
    return str(caught.value)


LARGE = pixels(1, 120, 90)
COMPLETE = {
    "jpeg": encode(LARGE, "JPEG"),
    "progressive": encode(LARGE, "JPEG", progressive=True),
    "cmyk": encode(LARGE.convert("CMYK"), "JPEG"),
    "grey": encode(LARGE.convert("L"), "JPEG"),
    "mpo": encode(LARGE, "MPO", save_all=True, append_images=[LARGE]),
    "png": encode(LARGE),
    "png-16-bit": encode(LARGE.convert("I;16"), "PNG"),
    "png-palette": encode(LARGE.quantize(8), "PNG"),
    "png-alpha": encode(LARGE.convert("RGBA"), "PNG"),
    "apng": encode(LARGE, "PNG", save_all=True, append_images=[pixels(2, 120, 90)]),
    "webp": encode(LARGE, "WEBP"),
    "webp-lossless": encode(LARGE, "WEBP", lossless=True),
    "webp-animated": encode(LARGE, "WEBP", save_all=True, append_images=[pixels(2, 120, 90)]),
    "gif": encode(LARGE, "GIF"),
    "gif-animated": encode(LARGE, "GIF", save_all=True, append_images=[pixels(2, 120, 90)]),
    "bmp": encode(LARGE, "BMP"),
    "tiff": encode(LARGE, "TIFF"),
    "tiff-pages": encode(
        LARGE, "TIFF", save_all=True, append_images=[LARGE], compression="tiff_lzw"
    ),
    "ppm": encode(LARGE, "PPM"),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_images_are_identified_despite_trailing_bytes(name: str) -> None:
    content = COMPLETE[name]
    expected = EXTENSIONS[str(Image.open(io.BytesIO(content)).format)]
    for garbage in (b"", b"\0" * 7, b"\r\n", bytes(range(256)) * 40):
        assert identified(content + garbage) == expected


@pytest.mark.parametrize("name", COMPLETE)
def test_truncated_images_are_rejected_at_any_length(name: str) -> None:
    content = COMPLETE[name]
    harmless = {"gif": 1, "gif-animated": 1, "ppm": 0}.get(
        name, 0
    )  # a GIF is complete without its trailer
    if name in ("mpo", "tiff-pages"):  # the first image counts, and is complete
        content = content[: len(content) // 2 - 50]
    for missing in (
        1,
        2,
        3,
        11,
        12,
        13,
        40,
        len(content) // 3,
        len(content) // 2,
        len(content) - 100,
        len(content) - 4,
    ):
        if missing > harmless:
            assert fault_of(content[:-missing])


def test_truncated_jpeg_with_a_complete_thumbnail_is_rejected() -> None:
    thumbnail, image = jpeg(quality=30), encode(LARGE, "JPEG")
    content = (
        image[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + image[2:]
    )
    assert identified(content) == "jpg"
    assert "end-of-image" in fault_of(content[:-2])
    assert "truncated" in fault_of(content[: len(thumbnail) + 6])


def test_headers_longer_than_the_first_read_are_supported() -> None:
    image = encode(LARGE, "JPEG")
    comment = b"\xff\xfe" + struct.pack(">H", 60_000) + b"c" * 59_998
    assert identified(image[:2] + comment * 3 + image[2:]) == "jpg"
    assert fault_of(image[:2] + comment * 3 + image[2:-2])
    profile = zlib.compress(bytes(range(256)) * 100, 0)
    content = encode(LARGE, "PNG", icc_profile=profile)
    assert identified(content) == "png"
    assert fault_of(content[:-13])


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_unsupported_formats_are_named_and_never_opened(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, reason = NOT_SUPPORTED[name]
    for plugin in ("EPS", "DDS", "PSD", "ICO", "AVIF", "JPEG2000", "TGA"):
        Image.init()
        if plugin in Image.OPEN:
            _, accept = Image.OPEN[plugin]
            monkeypatch.setitem(Image.OPEN, plugin, (lambda *_: pytest.fail("opened"), accept))
    assert reason in fault_of(content)


def test_decompression_bombs_are_rejected_by_their_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    for side in (13_378, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        assert side * side > MAX_PIXELS
        bomb = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b"")
        )
        assert "bomb" in fault_of(bomb)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"]), st.data())
def test_corrupt_bytes_give_an_extension_or_a_reason(name: str, data: st.DataObject) -> None:
    content = bytearray(COMPLETE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 600)))] = data.draw(
            st.integers(0, 255)
        )
    end = data.draw(st.integers(0, len(content)))
    for part in (bytes(content), bytes(content[:end]), bytes(content[end:])):
        try:
            assert identified(part) in EXTENSIONS.values()
        except ImageFault as fault:
            assert str(fault)  # noqa: PT017


def test_open_supported_detects_the_format_by_content() -> None:
    assert open_supported(png()).format == "PNG"
    assert open_supported(memoryview(jpeg())).format == "JPEG"
    assert fault_of(b"") == "empty"
