"""Label smoothing, mixup and CutMix, compared with timm and torchvision."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, ks_2samp, kstest
from timm.data import mixup as timm_mixup
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torchvision.transforms import v2

from trainer.config.run_plan import build_run_plan
from trainer.config.schema import RunConfig, load_config
from trainer.data.batch import Batch
from trainer.data.index import open_index
from trainer.data.loader import train_loader
from trainer.data.random_streams import LATEST_VERSION, RandomStreams
from trainer.data.transforms.mixup import Mix, Mixup, apply_mix
from trainer.engine.engine import Engine, StepOutput
from trainer.errors import UserError
from trainer.training.batch_plan import BatchPlan
from trainer.training.loss import weighted_loss

CLASSES = 7


def _logits_and_labels(size: int, heads: int = 1) -> tuple[tuple[Tensor, ...], Tensor]:
    torch.manual_seed(size)
    return tuple(3 * torch.randn(size, CLASSES) for _ in range(heads)), torch.randint(
        0, CLASSES, (size,)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_matches_timm(smoothing: float) -> None:
    """In the main and auxiliary heads, and with soft targets."""
    (main, first, second), labels = _logits_and_labels(11, heads=3)
    theirs = LabelSmoothingCrossEntropy(smoothing)
    want = theirs(main, labels) + 0.3 * (theirs(first, labels) + theirs(second, labels))
    ones = torch.ones(11)
    torch.testing.assert_close(
        weighted_loss((main, first, second), labels, ones, 11.0, 1, smoothing), want
    )
    soft = SoftTargetCrossEntropy()(main, mixup_target(labels, CLASSES, 1.0, smoothing))
    torch.testing.assert_close(weighted_loss(main, labels, ones, 11.0, 1, smoothing), soft)


def test_label_smoothing_excludes_padding() -> None:
    (logits,), labels = _logits_and_labels(8)
    weights = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0])
    want = LabelSmoothingCrossEntropy(0.1)(logits[weights > 0], labels[weights > 0])
    torch.testing.assert_close(weighted_loss(logits, labels, weights, 5.0, 1, 0.1), want)


# --- mixup and CutMix -------------------------------------------------------------------------


class TimmMixup(timm_mixup.Mixup):
    """timm's Mixup with a given lambda.

    The centre of the box is drawn from numpy's global generator.
    """

    def __init__(self, lam: float, use_cutmix: bool, smoothing: float) -> None:
        super().__init__(1.0, 1.0, label_smoothing=smoothing, num_classes=CLASSES)
        self.given = lam, use_cutmix

    def _params_per_batch(self) -> tuple[float, bool]:
        return self.given


class FixedGenerator:
    """A random generator that returns given values."""

    def __init__(self, coin: float, lam: float, centre: tuple[int, int]) -> None:
        self.coin, self.lam, self.centre = coin, lam, centre

    def random(self) -> float:
        return self.coin

    def beta(self, a: float, b: float) -> float:
        return self.lam

    def integers(self, low: int, high: int, count: int) -> list[int]:
        assert (low, count) == (0, 2)
        assert max(self.centre) < high
        return list(self.centre)


@settings(max_examples=150, deadline=None)
@given(
    use_cutmix=st.booleans(),
    lam=st.floats(0, 1),
    size=st.integers(2, 33),
    pairs=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_mixed_pixels_and_loss_match_timm(
    use_cutmix: bool, lam: float, size: int, pairs: int, seed: int, smoothing: float
) -> None:
    torch.manual_seed(seed)
    images, labels = torch.randn(2 * pairs, 3, size, size), torch.randint(0, CLASSES, (2 * pairs,))
    logits, weights = torch.randn(2 * pairs, CLASSES), (torch.rand(2 * pairs) > 0.3).float()
    weights[0] = 1
    np.random.seed(seed)
    centre = np.random.randint(0, size), np.random.randint(0, size)
    np.random.seed(seed)
    want, targets = TimmMixup(lam, use_cutmix, smoothing)(images.clone(), labels)

    given_numbers = FixedGenerator(0.0 if use_cutmix else 0.999, lam, centre)
    mix = Mixup(mixup=0.2, cutmix=1.0).draw(given_numbers, size)  # type: ignore[arg-type]
    torch.testing.assert_close(apply_mix(images.clone(), mix), want)
    channels_last = images.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(apply_mix(channels_last, mix), want)
    each = -(targets * torch.log_softmax(logits, 1)).sum(1)
    total = float(weights.sum())
    torch.testing.assert_close(
        weighted_loss(logits, labels, weights, total, 1, smoothing, mix.lam),
        (each * weights).sum() / total,
    )
    in_tensor = weighted_loss(
        (logits, logits), labels, weights, total, 1, smoothing, torch.tensor(mix.lam)
    )
    torch.testing.assert_close(in_tensor, 1.3 * (each * weights).sum() / total)


@pytest.mark.parametrize("box", [None, (3, 9, 0, 16), (0, 1, 15, 16), (4, 4, 2, 5)])
def test_mix_of_a_pair_matches_torchvision(box: tuple[int, int, int, int] | None) -> None:
    """torchvision mixes with the neighbour in a rolled batch, which is the same for two samples."""
    torch.manual_seed(0)
    images, labels, logits = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([1, 4]),
        torch.randn(2, CLASSES),
    )
    if box is None:
        lam, theirs, params = 0.3, v2.MixUp(num_classes=CLASSES), {"lam": 0.3}
    else:
        top, bottom, left, right = box
        lam = 1 - (bottom - top) * (right - left) / 256
        theirs, params = (
            v2.CutMix(num_classes=CLASSES),
            {"box": (left, top, right, bottom), "lam_adjusted": lam},
        )
    params |= {"labels": labels, "batch_size": 2}
    torch.testing.assert_close(
        apply_mix(images.clone(), Mix(lam, box)), theirs.transform(images, params)
    )
    want = torch.nn.functional.cross_entropy(
        logits, theirs.transform(labels, params), label_smoothing=0.1
    )
    torch.testing.assert_close(weighted_loss(logits, labels, torch.ones(2), 2.0, 1, 0.1, lam), want)


def _draw(
    seed: int, epoch: int, step: int, micro_batch: int, mixup: float, cutmix: float, size: int
) -> Mix:
    generator = RandomStreams(LATEST_VERSION, seed, epoch).generator("mixup", step, micro_batch)
    return Mixup(mixup=mixup, cutmix=cutmix).draw(generator, size)


def _drawn(mixup: float, cutmix: float, size: int = 32, count: int = 4000) -> list[Mix]:
    return [_draw(0, 1, i // 8, i % 8, mixup, cutmix, size) for i in range(count)]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_lambda_follows_the_beta_distribution(alpha: float) -> None:
    lams = np.array([mix.lam for mix in _drawn(alpha, 0.0)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert lams.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(lams)))
    assert lams.var() == pytest.approx(variance, rel=0.06)
    if alpha > 0.1:  # at lower alpha, many values round to 1
        assert kstest(lams, beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_box_distribution_matches_timm(alpha: float) -> None:
    """Including boxes that are clipped at the border, whose lambda is corrected."""
    ours = _drawn(0.0, alpha)
    np.random.seed(0)
    theirs = [
        timm_mixup.cutmix_bbox_and_lam((3, 32, 32), np.random.beta(alpha, alpha))
        for _ in range(4000)
    ]
    assert ks_2samp([mix.lam for mix in ours], [lam for _, lam in theirs]).pvalue > 0.01
    for side in range(4):
        assert (
            ks_2samp([mix.box[side] for mix in ours], [box[side] for box, _ in theirs]).pvalue
            > 0.01
        )  # type: ignore[index]


def test_mixup_and_cutmix_each_apply_to_half_of_the_batches() -> None:
    mixes = _drawn(4.0, 1.0)
    blended = np.array([mix.lam for mix in mixes if mix.box is None])
    assert 1900 < len(blended) < 2100
    assert kstest(blended, beta(4, 4).cdf).pvalue > 0.01
    cutmix_only = [mix.lam for mix in _drawn(0.0, 1.0)]
    assert ks_2samp([mix.lam for mix in mixes if mix.box], cutmix_only).pvalue > 0.01
    assert not Mixup().enabled


def _config(data: Path, **augment: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {
                "train": str(data / "train"),
                "image_size": 8,
                "workers": 0,
                "shuffle_window": 96,
                "seed": 5,
            },
            "batch": {"global_size": 48},
            "augment": {"crop": "none", **augment},
            "train": {"max_steps": 1},
        }
    )


def _batches(
    data: Path, epoch: int, world: int, accumulation: int, steps: int, **augment: float
) -> dict[tuple[int, int], Batch]:
    """Return the batches of all ranks, by step and number of the micro-batch."""
    index, store = open_index(str(data / "train"))
    found = {}
    for rank in range(world):
        batches = train_loader(
            _config(data, **augment), index, store, epoch, world, rank, accumulation
        )
        for i, batch in enumerate(islice(batches, steps * accumulation)):
            found[i // accumulation, i % accumulation * world + rank] = batch
        batches.close()  # type: ignore[attr-defined]
    return found


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([(2, 1), (4, 1), (2, 2), (3, 4), (12, 1), (6, 2)]),
    st.integers(0, 3),
    st.sampled_from([(0.2, 1.0), (0.0, 0.5)]),
)
def test_mixes_do_not_depend_on_the_number_of_ranks(
    digits: Path, split: tuple[int, int], epoch: int, alphas: tuple
) -> None:
    augment = dict(zip(("mixup", "cutmix"), alphas, strict=True))
    world, accumulation = split
    shared = _batches(digits, epoch, world, accumulation, 3, **augment)
    alone = _batches(digits, epoch, 1, world * accumulation, 3, **augment)
    assert {number: (b.keys, b.mix) for number, b in shared.items()} == {
        number: (b.keys, b.mix) for number, b in alone.items()
    }
    assert len({b.mix for b in alone.values()}) > 1.5 * world * accumulation, (
        "each micro-batch has its own mix"
    )
    assert all(b.lam == b.mix.lam for b in alone.values())  # type: ignore[union-attr]


def test_mixes_depend_on_epoch_and_seed_and_are_off_by_default(
    digits: Path,
) -> None:
    first, second = (_batches(digits, epoch, 1, 2, 2, mixup=0.2)[0, 0].mix for epoch in (0, 1))
    assert first != second
    assert first == _draw(5, 0, 0, 0, 0.2, 0.0, 8) != _draw(6, 0, 0, 0, 0.2, 0.0, 8)
    off = _batches(digits, 0, 1, 2, 2)
    assert {(b.mix, b.lam) for b in off.values()} == {(None, None)}


class BareEngine(Engine):
    """An engine with only the image preparation of the base class."""

    def step(self, batches: Iterator[Batch], learning_rate: float) -> StepOutput:
        raise NotImplementedError

    def _gather_full_state_dict(
        self, own: dict[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _data_group(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("box", [None, (2, 7, 0, 5)])
def test_engine_mixes_in_fp32_before_the_cast(
    digits: Path, box: tuple[int, int, int, int] | None
) -> None:
    config = _config(digits).model_copy(update={"precision": "bf16"})
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    batch = Batch(pixels, np.zeros(6, np.int64), np.ones(6, np.float32), 6.0, [], Mix(0.3, box))
    got = BareEngine(
        torch.nn.Flatten(), config, BatchPlan(6, 6, 1, 1), torch.device("cpu")
    )._images(batch)
    normal = v2.functional.normalize(
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, config.data.mean, config.data.std
    )
    want = normal.clone()
    if box is None:
        want = want.mul_(0.3).add_(normal.flip(0).mul_(0.7))
    else:
        want[:, :, 2:7, 0:5] = normal.flip(0)[:, :, 2:7, 0:5]
    assert got.dtype == torch.bfloat16
    assert (got == want.bfloat16()).float().mean() > 0.99, "except for rounding"
    torch.testing.assert_close(got, want.bfloat16())


def test_mixing_with_a_micro_batch_of_one_is_rejected(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: resnet8}}\ndata: {{train: {digits}/train}}\ntrain: "
        f"{{epochs: 1}}\nbatch: {{micro_size: 1}}\n"
    )
    build_run_plan(str(recipe), [], 1, False)
    with pytest.raises(
        UserError, match=r"augment\.cutmix: mixes the samples of a micro-batch, which has only 1"
    ):
        build_run_plan(str(recipe), ["augment.cutmix=1"], 1, False)


def _rejection(tmp_path: Path, setting: str) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: resnet8}\ndata: {train: /data/train}\ntrain: {epochs: 1}\n")
    with pytest.raises(UserError) as error:
        load_config(str(recipe), [setting])
    return str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        "train.label_smoothing=1",
        "train.label_smoothing=-0.1",
        "augment.mixup=-1",
        "augment.cutmix=.inf",
    ],
)
def test_values_out_of_range_are_rejected(tmp_path: Path, setting: str) -> None:
    key, _, value = setting.partition("=")
    assert f"{key}: {value.strip('.')} is invalid: input should be" in _rejection(tmp_path, setting)
