"""The figures of ``convoy models``."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights

from trainer.errors import UserError
from trainer.models import build_model, list_models
from trainer.models.model_info import forward_costs, model_info
from trainer.models.state_dict_adapter import schemes_of


@pytest.mark.parametrize(
    "name", [v.name for v in list_models() if "torchvision" in schemes_of(v.name)]
)
def test_figures_match_those_of_torchvision(name: str) -> None:
    entry = model_info(name)
    meta = next(iter(get_model_weights(name))).meta
    assert entry.parameters == meta["num_params"]
    assert entry.multiply_adds / 1e9 == pytest.approx(meta["_ops"], rel=0.01)
    assert entry.torchvision_top1 == meta["_metrics"]["ImageNet-1K"]["acc@1"]


def test_depths_and_parameters_match_the_papers() -> None:
    for variant in list_models():
        digits = "".join(c for c in variant.name if c.isdigit())
        entry = model_info(variant.name)
        if variant.family in ("resnet", "plain", "vgg"):
            assert entry.layers == int(digits), variant.name
        elif variant.family in ("alexnet", "googlenet"):
            assert entry.layers == {"alexnet": 8, "googlenet": 22}[variant.family]
        assert (entry.top5_error is None) == (entry.top5_source is None)
    # He et al. 2015, table 6, and Krizhevsky et al. 2012, section 3.5 (60 million), to their
    # printed precision
    for name, millions in (
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
    ):
        assert round(model_info(name).parameters / 1e6, 1 if millions > 1 else 2) == millions
    assert round(model_info("alexnet2012").parameters / 1e6) == 61


@pytest.mark.parametrize("name", ["alexnet2012", "googlenet2014", "vgg11_bn", "resnet20"])
def test_costs_match_a_real_forward_pass(name: str) -> None:
    """The reference is torch's FLOP counter and the storages that autograd saves, on the CPU."""
    model, side = build_model(name, 10, width=8), 64
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model.eval()(torch.randn(1, 3, side, side))
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = []
    for images in (4, 6):  # the difference excludes what does not grow with the batch
        saved: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            model.train()(torch.randn(images, 3, side, side))
        kept.append(
            sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in parameters)
        )
    with torch.device("meta"):
        multiply_adds, activation_bytes = forward_costs(build_model(name, 10, width=8), side)
    assert multiply_adds == counter.get_total_flops() // 2
    assert activation_bytes == pytest.approx((kept[1] - kept[0]) / 2, rel=0.01)


def test_image_size_below_the_minimum_is_an_error() -> None:
    with pytest.raises(UserError, match=r"needs at least 63 pixels, or 15 with model\.stem=small"):
        model_info("alexnet", 32)


def test_models_command_prints_every_network() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "models", "--json", "--image-size", "64"],
        capture_output=True,
        text=True,
        check=True,
    )
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert list(entries) == [v.name for v in list_models()]
    resnet50 = entries["resnet50"]
    assert (resnet50["year"], resnet50["layers"], resnet50["parameters"]) == (2015, 50, 25557032)
    assert resnet50["image_size"] == 64
    assert resnet50["top5_source"].startswith("He et al. 2015")
