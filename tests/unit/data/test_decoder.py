"""Decoding against Pillow and torchvision, for unusual formats and for corrupt bytes."""

import io
import random
import shutil
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from trainer.data.decode import decoder
from trainer.data.decode.decoder import (
    MAX_PIXELS,
    Box,
    DecodeError,
    crop_by_pillow,
    decode_crop,
    decode_rgb,
    decoder_in_use,
)

PHOTOGRAPH = load_sample_images().images[0]  # uint8 [427, 640, 3]
SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
native_only = pytest.mark.skipif(decoder._native is None, reason="the native decoder was not built")


def photograph(width: int, height: int, left: int = 0, top: int = 0) -> Image.Image:
    return Image.fromarray(PHOTOGRAPH[top : top + height, left : left + width])


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_440(jpeg: bytes) -> bytes:
    """A baseline 4:2:2 file relabelled as 4:4:0, which has the same number of blocks.

    It is half as wide and twice as high, with the blocks in another order.
    """
    at = jpeg.index(b"\xff\xc0\x00\x11\x08")
    height, width = struct.unpack(">HH", jpeg[at + 5 : at + 9])
    size = struct.pack(">HH", -(-height // 8) * 16, -(-width // 16) * 8)
    return jpeg[: at + 5] + size + jpeg[at + 9 : at + 11] + b"\x12" + jpeg[at + 12 :]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0\x00\x11\x08")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def reference(content: bytes, box: Box | None, size: int, flip: bool = False) -> np.ndarray:
    """Pillow's crop, resized: float [size, size, 3]."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    left, top, width, height = box or (0, 0, *image.size)
    image = image.crop((left, top, left + width, top + height)).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    return np.asarray(
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image, dtype=np.float64
    )


def cropped(content: bytes, box: Box | None, size: int, flip: bool = False) -> np.ndarray:
    """Convoy's crop, decoded into the middle of a batch whose other images must not change."""
    batch = np.full((3, size, size, 3), 7, np.uint8)
    decode_crop(content, lambda width, height: box or (0, 0, width, height), batch[1], flip)
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()
    return batch[1].astype(np.float64)


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    width, height = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    image = photograph(width, height, draw(st.integers(0, 400)), draw(st.integers(0, 250)))
    options: dict = {
        "quality": draw(st.integers(20, 98)),
        "progressive": draw(st.booleans()),
        "optimize": draw(st.booleans()),
    }
    if interval := draw(st.sampled_from([0, 0, 1, 5])):
        options["restart_marker_blocks"] = interval
    chroma = draw(st.sampled_from(["grey", "4:4:4", "4:2:2", "4:2:0", "4:4:0"]))
    if chroma == "grey":
        return encoded(image.convert("L"), **options)
    if chroma == "4:4:0":
        return as_440(encoded(image, **options | {"progressive": False}, subsampling="4:2:2"))
    return encoded(image, **options, subsampling=SUBSAMPLING[chroma])


@st.composite
def boxes(draw: st.DrawFn, content: bytes) -> Box:
    width, height = Image.open(io.BytesIO(content)).size
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top))


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_decode_crop_matches_pillow(data: st.DataObject) -> None:
    content = data.draw(jpegs())
    box, size, flip = (
        data.draw(boxes(content)),
        data.draw(st.sampled_from([1, 3, 8, 16, 33, 80])),
        data.draw(st.booleans()),
    )
    difference = np.abs(cropped(content, box, size, flip) - reference(content, box, size, flip))
    if min(box[2:]) < 4 * size:  # decoded at full scale
        assert difference.max() <= 2
        # below 0.5 for photographs, but a crop may be one pixel wide and of one color
        assert difference.mean() <= 1 or size < 8
    else:
        assert difference.mean() < 3 or size < 8


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_unresized_crop_is_bit_equal_to_pillow(data: st.DataObject) -> None:
    content = data.draw(jpegs())
    left, top, width, height = data.draw(boxes(content))
    size = min(width, height)
    assert (
        cropped(content, (left, top, size, size), size)
        == reference(content, (left, top, size, size), size)
    ).all()


@pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated:DeprecationWarning")
@pytest.mark.parametrize("progressive", [False, True])
def test_training_crops_match_torchvision(progressive: bool) -> None:
    """Large photographs, which are decoded at a reduced scale, are included."""
    torch.manual_seed(0)
    large = photograph(640, 427).resize((1800, 1200), Image.Resampling.LANCZOS)
    for image in (photograph(500, 375), large):
        content = encoded(image, quality=92, progressive=progressive)
        image_tensor = decode_image(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB
        )
        for _ in range(6):
            top, left, height, width = v2.RandomResizedCrop.get_params(
                image_tensor, [0.08, 1.0], [3 / 4, 4 / 3]
            )
            theirs = v2.functional.resized_crop(
                image_tensor, top, left, height, width, [224, 224], antialias=True
            )
            ours = cropped(content, (left, top, width, height), 224)
            difference = np.abs(ours - theirs.permute(1, 2, 0).numpy())
            # decoded at half the scale from 896 pixels on, where single pixels differ by more
            assert difference.mean() < 0.7
            assert difference.max() <= (2 if min(width, height) < 896 else 15)


def test_strong_reduction_keeps_the_mean() -> None:
    # 40 columns become one, at full scale because the 16 rows are not reduced
    content = encoded(photograph(640, 16), quality=95, subsampling=0)
    assert np.abs(cropped(content, None, 16) - reference(content, None, 16)).max() <= 1


UNUSUAL = {
    "grey": encoded(photograph(90, 60).convert("L")),
    "cmyk": encoded(photograph(90, 60).convert("CMYK")),
    "rgb-coded": encoded(photograph(90, 60), keep_rgb=True),
    "png": encoded(photograph(90, 60), "PNG"),
    "png-palette": encoded(photograph(90, 60).quantize(16), "PNG", transparency=3),
    "png-rgba": encoded(photograph(90, 60).convert("RGBA"), "PNG"),
    "png-grey-alpha": encoded(photograph(90, 60).convert("LA"), "PNG"),
    "png-16-bit": encoded(
        Image.fromarray(np.arange(5400, dtype=np.uint16).reshape(60, 90) * 12), "PNG"
    ),
    "png-1-bit": encoded(photograph(90, 60).convert("1"), "PNG"),
    "gif": encoded(photograph(90, 60), "GIF"),
    "webp": encoded(photograph(90, 60), "WEBP"),
    "exif-broken": encoded(photograph(90, 60), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12"),
    "one-wide": encoded(photograph(1, 90)),
    "one-high": encoded(photograph(90, 1)),
    "one-pixel": encoded(photograph(1, 1)),
    "trailing-garbage": encoded(photograph(90, 60)) + bytes(range(256)) * 20,
    "trailing-zeros": encoded(photograph(90, 60)) + bytes(6),
}
UNUSUAL["ycck"] = UNUSUAL["cmyk"].replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_formats_match_pillow(name: str) -> None:
    content = UNUSUAL[name]
    width, height = Image.open(io.BytesIO(content)).size
    box = (width // 3, height // 3, (width + 1) // 2, (height + 1) // 2)
    for flip in (False, True):
        assert (
            np.abs(cropped(content, box, 32, flip) - reference(content, box, 32, flip)).max() <= 2
        )
    assert (
        np.asarray(decode_rgb(content))
        == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    ).all()


def test_ycck_file_differs_from_the_cmyk_file() -> None:
    assert UNUSUAL["ycck"] != UNUSUAL["cmyk"]
    assert (
        np.abs(reference(UNUSUAL["ycck"], None, 9) - reference(UNUSUAL["cmyk"], None, 9)).max() > 5
    )


def test_exif_orientation_is_ignored_as_in_imagefolder() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    content = encoded(photograph(90, 60), exif=exif)
    assert decode_rgb(content).size == (90, 60)
    assert (
        np.abs(cropped(content, (0, 0, 90, 60), 32) - reference(content, (0, 0, 90, 60), 32)).max()
        <= 2
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        random.Random(0).randbytes(5000),
        b"<html>404 Not Found</html>" * 9,
    ],
)
def test_bytes_that_are_not_an_image_are_an_error(content: bytes) -> None:
    with pytest.raises(DecodeError, match=r"."):
        decode_rgb(content)
    with pytest.raises(DecodeError, match=r"."):
        cropped(content, None, 8)


def test_decompression_bombs_are_rejected_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    for content in (
        png + struct.pack(">I", 0) + b"IDAT" + bytes(4),
        with_size(encoded(photograph(16, 16)), 14000, 14000),
    ):
        assert MAX_PIXELS < 14000 * 14000
        for use in (decode_rgb, lambda content: cropped(content, (0, 0, 8, 8), 8)):
            with pytest.raises(DecodeError, match="bomb"):
                use(content)


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, 0, 91, 5), (0, 58, 5, 3), (3, 3, 0, 5), (0, 0, 2**40, 5)]
)
def test_box_outside_the_image_raises_value_error(box: Box) -> None:
    with pytest.raises(ValueError, match="not inside"):
        cropped(encoded(photograph(90, 60)), box, 8)


TRUNCATABLE = {
    "baseline": encoded(photograph(90, 60)),
    "progressive": encoded(photograph(90, 60), progressive=True),
    "restarts": encoded(photograph(90, 60), restart_marker_blocks=2),
    "thumbnail": encoded(
        photograph(90, 60), exif=b"Exif\0\0" + encoded(photograph(16, 12))
    ),  # an end marker in the middle
}


@pytest.mark.parametrize("name", TRUNCATABLE)
def test_truncated_file_is_an_error_even_if_the_crop_is_complete(name: str) -> None:
    content = TRUNCATABLE[name]
    for length in range(0, len(content) - 2, 13):
        with pytest.raises(DecodeError):
            cropped(content[:length], (10, 0, 20, 8), 8)


@native_only
@pytest.mark.parametrize("name", TRUNCATABLE)
def test_native_decoder_rejects_every_truncated_file(name: str) -> None:
    content, out = TRUNCATABLE[name], np.empty((8, 8, 3), np.uint8)
    decoder._native.decode_crop(content, (10, 0, 20, 8), out, False)
    for length in range(len(content)):
        for box in ((10, 0, 20, 8), (10, 40, 20, 20)):
            with pytest.raises(ValueError, match=r"."):
                decoder._native.decode_crop(content[:length], box, out, False)


def test_corrupt_bytes_never_crash() -> None:
    draw = random.Random(1)
    files = [
        *TRUNCATABLE.values(),
        as_440(encoded(photograph(64, 48), subsampling=1)),
        UNUSUAL["grey"],
        UNUSUAL["cmyk"],
    ]
    outcomes = {"decoded": 0, "rejected": 0}
    for number in range(1500):
        content = bytearray(draw.choice(files))
        for _ in range(draw.choice([1, 2, 9])):
            content[draw.randrange(2, len(content) if number % 2 else min(len(content), 640))] = (
                draw.randrange(256)
            )
        try:
            cropped(bytes(content), None if number % 5 else (0, 0, 8, 8), 16)
            outcomes["decoded"] += 1
        except (DecodeError, ValueError):
            outcomes["rejected"] += 1
    assert min(outcomes.values()) > 100


def test_concurrent_decoding_gives_the_same_pixels() -> None:
    contents = [
        encoded(photograph(200, 150, 10 * i, 5 * i), progressive=i % 2 == 1) for i in range(20)
    ] * 10
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda content: cropped(content, (11, 7, 150, 120), 96, True), contents)
        )
    for content, pixels in zip(contents[:20], found, strict=False):
        assert np.abs(pixels - reference(content, (11, 7, 150, 120), 96, True)).max() <= 2
    for i, pixels in enumerate(found):
        assert (pixels == found[i % 20]).all()


def test_decoding_does_not_leak_memory() -> None:
    good, bad = encoded(photograph(400, 300)), encoded(photograph(400, 300))[:9000]
    out = np.empty((64, 64, 3), np.uint8)

    def work() -> None:
        for _ in range(150):
            decode_crop(good, lambda width, height: (0, 0, width, height // 2), out, False)
            with pytest.raises(DecodeError):
                decode_crop(bad, lambda width, height: (0, 0, width, height), out, False)

    work()
    before = psutil.Process().memory_info().rss
    work()
    work()
    assert psutil.Process().memory_info().rss - before < 4 * 2**20


def test_pillow_is_used_without_the_native_decoder() -> None:
    code = (
        "import sys, io\nsys.modules['trainer.data._native'] = None\n"
        "import numpy as np\nfrom trainer.data.decode.decoder import decode_crop, decoder_in_use\n"
        "out = np.empty((16, 16, 3), np.uint8)\n"
        "decode_crop(sys.stdin.buffer.read(), lambda width, height: (3, 4, 50, 40), out, True)\n"
        "print(decoder_in_use(), out.tobytes().hex(), sep='|')\n"
    )
    content = encoded(photograph(90, 60))
    result = subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, check=True
    ).stdout.decode()
    name, pixels = result.strip().split("|")
    assert "Pillow" in name
    assert (
        np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(16, 16, 3)
        == reference(content, (3, 4, 50, 40), 16, True)
    ).all()


def test_python_decoder_is_bit_equal_to_pillow() -> None:
    out = np.empty((31, 31, 3), np.uint8)
    for name, content in UNUSUAL.items():
        width, height = Image.open(io.BytesIO(content)).size
        crop_by_pillow(content, lambda w, h: (0, 0, w, h), out, True)
        assert (out == reference(content, (0, 0, width, height), 31, True)).all(), name


@native_only
def test_native_header_returns_size_and_support() -> None:
    assert decoder._native.header(encoded(photograph(90, 60))) == (90, 60, True)
    assert decoder._native.header(UNUSUAL["grey"]) == (90, 60, True)
    assert decoder._native.header(TRUNCATABLE["progressive"]) == (90, 60, True)
    assert decoder._native.header(UNUSUAL["cmyk"]) == (90, 60, False)
    assert decoder._native.header(UNUSUAL["rgb-coded"]) == (90, 60, False)
    assert decoder._native.header(UNUSUAL["png"]) is None
    assert decoder._native.header(b"") is None


@native_only
@pytest.mark.parametrize("shape", [(8, 9, 3), (8, 8, 4), (8, 8), (0, 0, 3)])
def test_native_decoder_accepts_only_contiguous_square_outputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="size, size"):
        decoder._native.decode_crop(
            encoded(photograph(90, 60)), (0, 0, 9, 9), np.empty(shape, np.uint8), False
        )
    with pytest.raises((ValueError, BufferError)):
        decoder._native.decode_crop(
            encoded(photograph(90, 60)), (0, 0, 9, 9), np.empty((8, 16, 3), np.uint8)[:, ::2], False
        )


def test_native_decoder_is_built_if_a_compiler_and_libjpeg_exist() -> None:
    if shutil.which("gcc") is None or not Path("/usr/include/jpeglib.h").exists():
        pytest.skip("needs a compiler and libjpeg-turbo")
    assert decoder_in_use().startswith("native")


def test_choose_gets_the_image_size_once() -> None:
    sizes: list[tuple[int, int]] = []

    def choose(width: int, height: int) -> Box:
        sizes.append((width, height))
        return 0, 0, width, height

    for content in (encoded(photograph(90, 60)), UNUSUAL["png"], UNUSUAL["cmyk"]):
        decode_crop(content, choose, np.empty((8, 8, 3), np.uint8), False)
    assert sizes == [(90, 60)] * 3
