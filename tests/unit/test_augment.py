"""Decoding and augmentation against PIL and torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from trainer.data.augment import UNIFORMS, eval_transform, padded_crop, random_resized_crop, train_transform
from trainer.data.decode import DecodeError, decode_rgb, to_array
from trainer.models.layers import normalize


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (0, 0, 200, 427), (10, 10, 310, 310), (0, 0, 233, 57), (0, 0, 224, 224)])
def test_the_evaluation_view_is_torchvisions(photographs: list[Image.Image], box: tuple) -> None:
    image = photographs[0].crop(box)
    want = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    got = eval_transform(image, 224, 0.875)
    assert got.size == (224, 224)
    assert np.array_equal(to_array(got), np.asarray(want))


def test_a_whole_image_is_left_as_it_is(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    assert np.array_equal(to_array(eval_transform(image, 28, 1.0)), np.asarray(image))


def test_random_resized_crop_follows_torchvisions_distribution(photographs: list[Image.Image]) -> None:
    """Read off the place and size of crops of an image whose pixels are their own coordinates."""
    width, height = 200, 150
    ours, theirs = [], []
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    chart = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    random, theirs_transform = np.random.default_rng(0), v2.RandomResizedCrop(64, antialias=True)
    torch.manual_seed(0)
    for _ in range(3000):
        crop = np.asarray(random_resized_crop(chart, 64, 0.08, random.random(UNIFORMS)), float)
        spans = crop[:, -1, 0].mean() - crop[:, 0, 0].mean(), crop[-1, :, 1].mean() - crop[0, :, 1].mean()
        ours.append([*spans, crop[..., 0].mean()])
        params = theirs_transform.make_params([chart])
        theirs.append([params["width"] * 63 / 64, params["height"] * 63 / 64, params["left"] + params["width"] / 2])
    for column in range(3):
        a, b = np.array(ours)[:, column], np.array(theirs)[:, column]
        for q in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert np.quantile(a, q) == pytest.approx(np.quantile(b, q), abs=5), (column, q)


def test_random_resized_crop_resizes_as_torchvision(photographs: list[Image.Image]) -> None:
    uniforms = np.random.default_rng(1).random(UNIFORMS)
    uniforms[3:5] = 1.0, 0.5  # the whole area does not fit with aspect 1; later tries decide
    image = photographs[1]
    got = random_resized_crop(image, 96, 0.08, uniforms)
    for u_area, u_ratio in uniforms[3:23].reshape(10, 2):
        area, ratio = 640 * 427 * (0.08 + 0.92 * u_area), (3 / 4) * (16 / 9) ** u_ratio
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= 640 and h <= 427:
            break
    top, left = int(uniforms[2] * (427 - h + 1)), int(uniforms[1] * (640 - w + 1))
    want = TF.resized_crop(image, top, left, h, w, [96, 96], antialias=True)
    assert np.abs(to_array(got).astype(int) - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (3000, 20)])
def test_any_shape_gives_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (1, 2, 3))
    uniforms = np.random.default_rng(0).random(UNIFORMS)
    for crop in ("resized", "padded", "none"):
        assert train_transform(image, 32, crop, 4, 0.08, True, 0.875, uniforms).size == (32, 32)
    assert eval_transform(image, 32, 0.875).size == (32, 32)


def test_padded_crop_is_a_window_of_the_padded_image(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    padded = np.asarray(v2.Pad(2)(image))
    places = set()
    for _ in range(300):
        uniforms = np.random.default_rng(len(places) + _).random(UNIFORMS)
        crop = to_array(padded_crop(image, 28, 2, uniforms))
        left, top = int(uniforms[1] * 5), int(uniforms[2] * 5)
        assert np.array_equal(crop, padded[top : top + 28, left : left + 28])
        places.add((left, top))
    assert len(places) == 25


def test_flip_is_for_half_of_them(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    random = np.random.default_rng(0)
    flipped = sum(
        np.array_equal(
            to_array(train_transform(image, 28, "none", 0, 1.0, True, 1.0, random.random(UNIFORMS))), np.asarray(image)[:, ::-1]
        )
        for _ in range(1000)
    )
    assert 430 < flipped < 570


def test_normalize_is_torchvisions(photographs: list[Image.Image]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(np.asarray(photographs[0]).copy())[None]
    want = TF.normalize(TF.to_dtype(pixels.permute(0, 3, 1, 2), torch.float32, scale=True), mean, std)
    got = normalize(pixels, mean, std)
    assert torch.allclose(got, want, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_decoding_is_pils(photographs: list[Image.Image], form: str) -> None:
    for mode in ("RGB", "L"):
        encoded = _encoded(photographs[0].convert(mode), form)
        assert np.array_equal(to_array(decode_rgb(encoded)), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


def test_cmyk_palette_and_alpha_become_rgb(photographs: list[Image.Image]) -> None:
    for encoded in (
        _encoded(photographs[0].convert("CMYK"), "JPEG"),
        _encoded(photographs[0].convert("P"), "PNG"),
        _encoded(photographs[0].convert("RGBA"), "PNG"),
        _encoded(photographs[0].convert("LA"), "PNG"),
    ):
        assert to_array(decode_rgb(encoded)).shape == (427, 640, 3)


def test_what_is_no_whole_image_is_refused(photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _encoded(photographs[0], "JPEG")
    for encoded in (b"", b"no image", whole[: len(whole) // 2], _encoded(photographs[0], "PNG")[:5000]):
        with pytest.raises(DecodeError):
            decode_rgb(encoded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL's own bound
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode_rgb(whole)
