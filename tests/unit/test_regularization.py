"""Label smoothing, against timm's losses."""

from pathlib import Path

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from trainer.config import load_config
from trainer.engine.objective import weighted_loss
from trainer.errors import UserError

CLASSES = 7


def _logits_and_labels(size: int, heads: int = 1) -> tuple[tuple[Tensor, ...], Tensor]:
    torch.manual_seed(size)
    return tuple(3 * torch.randn(size, CLASSES) for _ in range(heads)), torch.randint(0, CLASSES, (size,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_is_timms(smoothing: float) -> None:
    """In the main head and in auxiliary ones; and equal to soft targets."""
    (main, first, second), labels = _logits_and_labels(11, heads=3)
    theirs = LabelSmoothingCrossEntropy(smoothing)
    want = theirs(main, labels) + 0.3 * (theirs(first, labels) + theirs(second, labels))
    ones = torch.ones(11)
    torch.testing.assert_close(weighted_loss((main, first, second), labels, ones, 11.0, 1, smoothing), want)
    soft = SoftTargetCrossEntropy()(main, mixup_target(labels, CLASSES, 1.0, smoothing))
    torch.testing.assert_close(weighted_loss(main, labels, ones, 11.0, 1, smoothing), soft)


def test_label_smoothing_leaves_padding_out() -> None:
    (logits,), labels = _logits_and_labels(8)
    weights = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0])
    want = LabelSmoothingCrossEntropy(0.1)(logits[weights > 0], labels[weights > 0])
    torch.testing.assert_close(weighted_loss(logits, labels, weights, 5.0, 1, 0.1), want)


def _refused(tmp_path: Path, setting: str) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: resnet8}\ndata: {train: /data/train}\ntrain: {epochs: 1}\n")
    with pytest.raises(UserError) as error:
        load_config(str(recipe), [setting])
    return str(error.value)


@pytest.mark.parametrize("setting", ["train.label_smoothing=1", "train.label_smoothing=-0.1"])
def test_values_out_of_range_are_refused(tmp_path: Path, setting: str) -> None:
    key, _, value = setting.partition("=")
    assert f"{key}: {value} is wrong: input should be" in _refused(tmp_path, setting)
