"""Decoding and augmentation against PIL and torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from trainer.config.schema import RunConfig
from trainer.data.decode.decoder import DecodeError, decode_rgb, to_array
from trainer.data.loader import build_train_transform
from trainer.data.transforms.augmentation import AUGMENTATIONS, Uniforms
from trainer.data.transforms.auto_augment import CHANGES, RandAugment, TrivialAugment, change
from trainer.data.transforms.crop import PaddedCrop, eval_transform
from trainer.data.transforms.random_erasing import RandomErasing
from trainer.models.layers import normalize


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


FILL = np.array([1, 1, 1], np.uint8)


def _uniforms(random: np.random.Generator) -> Uniforms:
    """Random numbers of one sample for all augmentations."""
    return {a.stream: random.random(a.num_uniforms) for a in AUGMENTATIONS}


def _view(encoded: bytes, uniforms: Uniforms, size: int, **augment: object) -> np.ndarray:
    """The training transform of a recipe with these ``augment`` keys, applied to an image."""
    config = RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {"train": "none"},
            "train": {"max_steps": 1},
            "augment": augment,
        }
    )
    out = np.empty((size, size, 3), np.uint8)
    build_train_transform(config)(memoryview(encoded), uniforms, out)
    return out


@pytest.mark.parametrize(
    "box",
    [(0, 0, 640, 427), (0, 0, 200, 427), (10, 10, 310, 310), (0, 0, 233, 57), (0, 0, 224, 224)],
)
def test_eval_transform_matches_torchvision(photographs: list[Image.Image], box: tuple) -> None:
    image = photographs[0].crop(box)
    want = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    got = eval_transform(image, 224, 0.875)
    assert got.size == (224, 224)
    assert np.array_equal(to_array(got), np.asarray(want))


def test_eval_transform_keeps_an_image_of_the_target_size(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    assert np.array_equal(to_array(eval_transform(image, 28, 1.0)), np.asarray(image))


def test_random_resized_crop_has_the_distribution_of_torchvision(
    photographs: list[Image.Image],
) -> None:
    """The position and size of a crop are read from an image whose pixels are their coordinates."""
    width, height = 200, 150
    ours, theirs = [], []
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    chart = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    encoded = _encoded(chart, "PNG", compress_level=0)
    random, theirs_transform = np.random.default_rng(0), v2.RandomResizedCrop(64, antialias=True)
    torch.manual_seed(0)
    for _ in range(3000):
        crop = _view(encoded, _uniforms(random), 64, flip=False).astype(float)
        spans = (
            crop[:, -1, 0].mean() - crop[:, 0, 0].mean(),
            crop[-1, :, 1].mean() - crop[0, :, 1].mean(),
        )
        ours.append([*spans, crop[..., 0].mean()])
        params = theirs_transform.make_params([chart])
        theirs.append(
            [
                params["width"] * 63 / 64,
                params["height"] * 63 / 64,
                params["left"] + params["width"] / 2,
            ]
        )
    for column in range(3):
        a, b = np.array(ours)[:, column], np.array(theirs)[:, column]
        for q in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert np.quantile(a, q) == pytest.approx(np.quantile(b, q), abs=5), (column, q)


def test_random_resized_crop_resizes_like_torchvision(photographs: list[Image.Image]) -> None:
    uniforms = _uniforms(np.random.default_rng(1))
    numbers = uniforms["random_resized_crop"]
    numbers[2:4] = 1.0, 0.5  # the full area does not fit with aspect 1; a later attempt is used
    image = photographs[1]
    got = _view(_encoded(image, "PNG", compress_level=0), uniforms, 96, flip=False)
    for u_area, u_ratio in numbers[2:].reshape(10, 2):
        area, ratio = 640 * 427 * (0.08 + 0.92 * u_area), (3 / 4) * (16 / 9) ** u_ratio
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= 640 and h <= 427:
            break
    top, left = int(numbers[1] * (427 - h + 1)), int(numbers[0] * (640 - w + 1))
    want = TF.resized_crop(image, top, left, h, w, [96, 96], antialias=True)
    assert np.abs(got.astype(int) - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (3000, 20)])
def test_any_image_shape_gives_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (1, 2, 3))
    uniforms = _uniforms(np.random.default_rng(0))
    for crop in ("resized", "padded", "none"):
        assert (
            _view(_encoded(image, "PNG"), uniforms, 32, crop=crop) == (1, 2, 3)
        ).all() or crop == "padded"
    assert eval_transform(image, 32, 0.875).size == (32, 32)


def test_padded_crop_is_a_window_of_the_padded_image(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    padded = np.asarray(v2.Pad(2)(image))
    places = set()
    for _ in range(300):
        uniforms = np.random.default_rng(len(places) + _).random(2)
        crop = to_array(PaddedCrop(crop="padded", padding=2).shift(image, 28, uniforms))
        left, top = int(uniforms[0] * 5), int(uniforms[1] * 5)
        assert np.array_equal(crop, padded[top : top + 28, left : left + 28])
        places.add((left, top))
    assert len(places) == 25


def test_half_of_the_images_are_flipped(photographs: list[Image.Image]) -> None:
    image = photographs[0].crop((0, 0, 28, 28))
    random, encoded = np.random.default_rng(0), _encoded(image, "PNG")
    flipped = sum(
        np.array_equal(
            _view(encoded, _uniforms(random), 28, crop="none", eval_crop=1.0),
            np.asarray(image)[:, ::-1],
        )
        for _ in range(1000)
    )
    assert 430 < flipped < 570


# --- RandAugment, TrivialAugment, random erasing --------------------------------------------------


def _torchvisions(name: str, image: Image.Image, strength: float) -> Image.Image:
    """torchvision's function for the operation that the papers call ``name``."""
    shear = float(np.degrees(np.arctan(strength)))
    return {
        "identity": lambda: image,
        "shear_x": lambda: TF.affine(image, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0]),
        "shear_y": lambda: TF.affine(image, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0]),
        "translate_x": lambda: TF.affine(image, 0.0, [-int(strength), 0], 1.0, [0.0, 0.0]),
        "translate_y": lambda: TF.affine(image, 0.0, [0, -int(strength)], 1.0, [0.0, 0.0]),
        "rotate": lambda: TF.rotate(image, strength),
        "brightness": lambda: TF.adjust_brightness(image, 1 + strength),
        "color": lambda: TF.adjust_saturation(image, 1 + strength),
        "contrast": lambda: TF.adjust_contrast(image, 1 + strength),
        "sharpness": lambda: TF.adjust_sharpness(image, 1 + strength),
        "posterize": lambda: TF.posterize(image, 8 - int(abs(strength))),
        "solarize": lambda: TF.solarize(image, round(255 * (1 - abs(strength)))),
        "autocontrast": lambda: TF.autocontrast(image),
        "equalize": lambda: TF.equalize(image),
    }[name]()


@pytest.mark.parametrize("name", CHANGES)
def test_each_operation_matches_torchvision(photographs: list[Image.Image], name: str) -> None:
    image = photographs[1].crop((100, 50, 324, 274))
    strengths = {"rotate": (-30.0, 17.0), "posterize": (2.0, -4.0)}.get(name, (-0.3, 0.27))
    strengths = (-12.0, 40.0) if name.startswith("translate") else strengths
    for strength in strengths:
        difference = np.abs(
            to_array(change(image, name, strength)).astype(int)
            - to_array(_torchvisions(name, image, strength))
        )
        assert (difference > 0).mean() < 0.01, "only pixels on a border between two may differ"
        assert (
            name == "identity" or (to_array(change(image, name, strength)) != to_array(image)).any()
        )


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_magnitudes_match_the_table_of_torchvision(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's transforms draw the strength of each operation from this table."""
    drawn: dict[str, set[float]] = {name: set() for name in CHANGES}
    monkeypatch.setattr(
        "trainer.data.transforms.auto_augment.change",
        lambda image, name, value: (drawn[name].add(round(value, 3)), image)[1],
    )
    pixels, random = np.zeros((224, 224, 3), np.uint8), np.random.default_rng(0)
    ours = RandAugment(auto="rand", rand_layers=1) if policy == "rand" else TrivialAugment()
    for _ in range(20_000):
        ours.apply(pixels, random.random(ours.num_uniforms), FILL)
    theirs = (v2.RandAugment() if policy == "rand" else v2.TrivialAugmentWide())._AUGMENTATION_SPACE
    named = {
        key.lower().replace("shear", "shear_").replace("translate", "translate_"): value
        for key, value in theirs.items()
    }
    named["auto_contrast"] = named.pop("autocontrast", None) or named.get("auto_contrast")
    for name in CHANGES:
        magnitudes, signed = named["auto_contrast" if name == "autocontrast" else name]
        table = magnitudes(31, 224, 224)
        if table is None:
            continue
        values = table.tolist() if policy == "trivial" else [table[9].item()]
        if name == "posterize":
            ours = {8 - round(abs(value)) for value in drawn[name]}
            assert ours == set(values)
        elif name == "solarize":
            assert sorted({round(1 - abs(value), 3) for value in drawn[name]}) == pytest.approx(
                sorted(set(values)), abs=2e-3
            )
        else:
            both = (
                {round(sign * value, 3) for value in values for sign in (1, -1)}
                if signed
                else {round(v, 3) for v in values}
            )
            assert sorted(drawn[name]) == pytest.approx(sorted({v + 0.0 for v in both}), abs=2e-3)


def test_random_erasing_has_the_distribution_of_torchvision() -> None:
    ours, theirs = [], []
    random, eraser = np.random.default_rng(0), v2.RandomErasing(p=0.7, value=1)
    erasing = RandomErasing(erase=0.7)
    torch.manual_seed(0)
    for _ in range(3000):
        pixels = np.zeros((64, 64, 3), np.uint8)
        erasing.apply(pixels, random.random(erasing.num_uniforms), FILL)
        for found, mask in (
            (ours, pixels[..., 0]),
            (theirs, eraser(torch.zeros(3, 64, 64))[0].numpy()),
        ):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found.append(
                [
                    len(rows),
                    len(columns),
                    rows.mean() if len(rows) else -1,
                    columns.mean() if len(rows) else -1,
                ]
            )
    for column in range(4):
        for q in (0.1, 0.25, 0.4, 0.5, 0.75, 0.9):
            a, b = (np.quantile(np.array(found)[:, column], q) for found in (ours, theirs))
            assert a == pytest.approx(b, abs=3), (column, q)


def test_augmentation_is_a_function_of_its_random_numbers(
    photographs: list[Image.Image],
) -> None:
    encoded, random = _encoded(photographs[0], "JPEG"), np.random.default_rng(3)
    for _ in range(5):
        uniforms = _uniforms(random)
        plain, *rest = (
            _view(encoded, uniforms, 64, **keys)
            for keys in ({}, {"auto": "rand"}, {"auto": "trivial"}, {"erase": 1.0})
        )
        again = _view(encoded, uniforms, 64, auto="rand")
        assert np.array_equal(rest[0], again)
        assert not np.array_equal(rest[2], plain)


def test_normalize_matches_torchvision(photographs: list[Image.Image]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(np.asarray(photographs[0]).copy())[None]
    want = TF.normalize(
        TF.to_dtype(pixels.permute(0, 3, 1, 2), torch.float32, scale=True), mean, std
    )
    got = normalize(pixels, mean, std)
    assert torch.allclose(got, want, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_decoding_matches_pillow(photographs: list[Image.Image], form: str) -> None:
    for mode in ("RGB", "L"):
        encoded = _encoded(photographs[0].convert(mode), form)
        assert np.array_equal(
            to_array(decode_rgb(encoded)),
            np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")),
        )


def test_cmyk_palette_and_alpha_become_rgb(photographs: list[Image.Image]) -> None:
    for encoded in (
        _encoded(photographs[0].convert("CMYK"), "JPEG"),
        _encoded(photographs[0].convert("P"), "PNG"),
        _encoded(photographs[0].convert("RGBA"), "PNG"),
        _encoded(photographs[0].convert("LA"), "PNG"),
    ):
        assert to_array(decode_rgb(encoded)).shape == (427, 640, 3)


def test_incomplete_images_are_an_error(
    photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = _encoded(photographs[0], "JPEG")
    for encoded in (
        b"",
        b"no image",
        complete[: len(complete) // 2],
        _encoded(photographs[0], "PNG")[:5000],
    ):
        with pytest.raises(DecodeError):
            decode_rgb(encoded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's limit
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode_rgb(complete)
