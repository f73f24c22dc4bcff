"""Memory and time for an image are bounded by what the result needs, and errors name the sample."""

import io
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.helpers import RunText
from torchvision.transforms import v2

from pipelines.registry.evaluate import evaluate, predict_files
from trainer.data.decode.decoder import DecodeError, decode_crop, decode_rgb, to_array
from trainer.data.shards.tar import end_mark, write_sample
from trainer.data.transforms.crop import eval_transform
from trainer.errors import UserError
from trainer.export.exported_model import ModelMetadata, save_model


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(16, 40),
    st.booleans(),
    st.sampled_from([(16, 0.875), (24, 1.0), (20, 0.7)]),
)
def test_center_crop_of_an_elongated_image_matches_torchvision(
    short: int, ratio: int, upright: bool, crop: tuple
) -> None:
    """The sizes are small enough for the reference, which resizes the full image."""
    size, part = crop
    shape = (short, short * ratio) if upright else (short * ratio, short)
    image = _noise(*shape)
    want = v2.Compose([v2.Resize(round(size / part)), v2.CenterCrop(size)])(image)
    got = eval_transform(image, size, part)
    assert got.size == (size, size)
    difference = np.abs(to_array(got).astype(int) - np.asarray(want).astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.5


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (4_000, 1), (3, 9_000), (65_500, 2)])
def test_thin_images_need_little_memory_and_time(size: tuple[int, int]) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for kind in ("PNG", "JPEG"):
        content = _encoded(_noise(*size), kind)
        assert eval_transform(decode_rgb(content), 224, 0.875).size == (224, 224)
        out = np.empty((224, 224, 3), np.uint8)
        decode_crop(content, lambda width, height: (0, 0, width, height), out, flip=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "KiB"
    assert time.process_time() - started < 10


def test_decoding_keeps_one_copy_of_the_pixels() -> None:
    """An 80-megapixel image takes 305 MiB in Pillow; a second copy would not fit."""
    code = textwrap.dedent(
        """
        import io, resource, sys
        from PIL import Image
        from trainer.data.decode.decoder import decode_rgb
        file = io.BytesIO(); Image.new("RGB", (10_000, 8_000)).save(file, "PNG")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 420 * 2**20, resource.RLIM_INFINITY))
        assert decode_rgb(file.getvalue()).size == (10_000, 8_000)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _png_header(width: int, height: int) -> bytes:
    """A PNG with a size in its header and no pixels."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_png_header(200_000, 200_000), "pixels"),
        (b"DDS " + bytes(200), "DDS texture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"<!DOCTYPE html><title>404</title>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "AVIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xff\xd8\xff\xe0" + bytes(9), "corrupt"),
        (b"", "not an image"),
    ],
    ids=["bomb", "dds", "eps", "html", "lfs", "avif", "svg", "jpeg", "empty"],
)
def test_unsupported_formats_are_rejected_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_rgb(content)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    metadata = ModelMetadata(
        "resnet8", {"width": 4}, ["0", "1"], 2, 8, 0.875, [0.5] * 3, [0.5] * 3, True
    )
    save_model(folder, metadata.build(), metadata)
    return str(folder)


@pytest.fixture
def truncated_image_shard(tmp_path: Path, convoy_ok: RunText) -> str:
    """An indexed third-party shard of 8 images, of which the sixth is truncated."""
    folder = tmp_path / "shards"
    folder.mkdir()
    content = b""
    for number in range(8):
        parts: list[bytes] = []
        image = _encoded(_noise(20, 20))
        write_sample(
            parts.append,
            f"picture-{number}",
            "png",
            image[: len(image) // 2] if number == 5 else image,
            number % 2,
        )
        content += b"".join(parts)
    (folder / "a.tar").write_bytes(content + end_mark(len(content)))
    convoy_ok("index", folder, "--workers", 1)
    return str(folder)


def test_evaluation_names_the_sample_that_cannot_be_decoded(
    model: str, truncated_image_shard: str
) -> None:
    with pytest.raises(UserError, match=r"picture-5.*: cannot be decoded: ") as raised:
        evaluate(model, truncated_image_shard)
    assert truncated_image_shard in str(raised.value)
    assert "\n" not in str(raised.value)


def test_training_names_the_sample_that_cannot_be_decoded(
    truncated_image_shard: str, tmp_path: Path, convoy_refuses: RunText
) -> None:
    options = [
        f"data.train={truncated_image_shard}",
        f"data.val={truncated_image_shard}",
        "train.epochs=1",
        "schedule.warmup_epochs=0",
        "batch.global_size=8",
        "batch.micro_size=8",
    ]
    out = f"train.output_dir={tmp_path / 'out'}"
    message = convoy_refuses("train", "digits-resnet8", *options, "model.width=4", out)
    assert "picture-5" in message
    assert "cannot be decoded" in message


def test_prediction_names_an_invalid_file_and_classifies_a_thin_image(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "thin.png").write_bytes(_encoded(_noise(60_000, 1)))
    (answer,) = predict_files(model, [str(tmp_path / "thin.png")])
    assert len(answer["top5"]) == 2
    for name, content in (
        ("truncated.jpg", _encoded(_noise(64, 64), "JPEG")[:600]),
        ("page.jpg", b"<html></html>"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be decoded: "):
            predict_files(model, [str(tmp_path / name)])
