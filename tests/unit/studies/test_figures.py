"""The values that studies compute, against independent calculations; and verdicts."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from pipelines.studies.experiments import (
    activation,
    batch_norm,
    depth,
    gradient_path,
    identity,
    inception,
    pool_head,
    small_filters,
)
from pipelines.studies.experiments import then_and_now as then
from pipelines.studies.framework import measure
from pipelines.studies.framework.plots import smooth, thinned
from pipelines.studies.framework.study import BORNE_OUT, NOT_BORNE_OUT, UNDECIDED, Figures, mean_std
from trainer.models import build_model


@pytest.mark.parametrize("kernels", [(3, 3, 3), (7,), (5,), (3, 5), (1,)])
def test_receptive_field_grows_by_the_filter_size_minus_one(
    kernels: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Conv2d(2, 2, kernel, 1, kernel // 2) for kernel in kernels))
    assert measure.receptive_field(layers, 2, 21) == 1 + sum(kernel - 1 for kernel in kernels)


def test_counted_weights_of_small_filters_match_torchvision_and_arithmetic() -> None:
    stacked, single = small_filters.computed("stacked"), small_filters.computed("single")
    assert (stacked["receptive_field_pixels"], single["receptive_field_pixels"]) == (7, 7)
    assert (stacked["weights_per_channel_pair"], single["weights_per_channel_pair"]) == (
        3 * 3**2,
        7**2,
    )
    assert (stacked["non_linearities"], single["non_linearities"]) == (3, 1)
    convolutions = vgg16().features
    assert stacked["vgg16_convolution_parameters"] == sum(
        p.numel() for p in convolutions.parameters()
    )
    pairs = [(3, 64, 5), (64, 128, 5), (128, 256, 7), (256, 512, 7), (512, 512, 7)]
    assert single["vgg16_convolution_parameters"] == sum(a * b * k * k + b for a, b, k in pairs)


def test_pool_head_parameters_match_the_paper() -> None:
    tower, average = (pool_head.parameters("vgg16", head=head) for head in pool_head.HEADS)
    layers = ((25088, 4096), (4096, 4096), (4096, 1000))
    assert tower["fully_connected"] == sum(a * b + b for a, b in layers)
    assert tower["all"] == tower["convolutions"] + tower["fully_connected"] == 138_357_544
    assert average["fully_connected"] == 512 * 1000 + 1000
    assert average["convolutions"] == tower["convolutions"]


def test_cost_of_inception_without_reduction_matches_the_paper() -> None:
    """The differences of nine modules, computed from the channels in table 1."""
    modules = {  # input, 3x3 reduced, 3x3, 5x5 reduced, 5x5, side
        "3a": (192, 96, 128, 16, 32, 28),
        "3b": (256, 128, 192, 32, 96, 28),
        "4a": (480, 96, 208, 16, 48, 14),
        "4b": (512, 112, 224, 24, 64, 14),
        "4c": (512, 128, 256, 24, 64, 14),
        "4d": (512, 144, 288, 32, 64, 14),
        "4e": (528, 160, 320, 32, 128, 14),
        "5a": (832, 160, 320, 32, 128, 7),
        "5b": (832, 192, 384, 48, 128, 7),
    }
    weights = multiply_adds = biases = 0
    for x, r3, c3, r5, c5, side in modules.values():
        gained = x * c3 * 9 + x * c5 * 25 - (x * r3 + r3 * c3 * 9 + x * r5 + r5 * c5 * 25)
        weights, biases, multiply_adds = (
            weights + gained,
            biases + r3 + r5,
            multiply_adds + gained * side**2,
        )
    reduced, unreduced = (
        inception.costs("googlenet2014", 1000, 224, reduction=on) for on in (True, False)
    )
    assert unreduced["multiply_adds"] - reduced["multiply_adds"] == multiply_adds
    assert unreduced["parameters"] - reduced["parameters"] == weights - biases


def test_narrow_network_without_reduction_has_at_least_as_many_multiply_adds() -> None:
    """The network with reduction must not win by its cost."""
    reduced, narrow = (
        inception.costs("googlenet", 10, inception.SIDE, stem="small", width=width, reduction=on)[
            "multiply_adds"
        ]
        for width, on in ((inception.WIDTH, True), (inception.NARROW, False))
    )
    assert 1.0 <= narrow / reduced < 1.15


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg11", {"head": "average"}),
        ("vgg16_bn", {"filters": "single"}),
        ("alexnet2012", {"head": "average"}),
        ("googlenet", {"reduction": False}),
        ("googlenet2014", {"reduction": False}),
    ],
)
def test_study_networks_have_gradients_and_multiply_adds_of_torch(
    name: str, options: dict[str, object]
) -> None:
    """Every parameter gets a gradient; multiply-adds equal those of torch's counter in a forward
    pass.
    """
    torch.manual_seed(0)
    model = build_model(name, 10, 32, width=8, stem="small", **options)
    images, counter = torch.randn(4, 3, 32, 32), FlopCounterMode(display=False)
    norms = measure.gradient_norms(model, images, torch.arange(4))
    assert all(math.isfinite(value) for value in norms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.inference_mode(), counter:
        model.eval()(images[:1])
    with torch.device("meta"):
        copy = build_model(name, 10, 32, width=8, stem="small", **options)
    assert inception.forward_costs(copy, 32)[0] == counter.get_total_flops() // 2


def test_gradients_at_blocks_match_autograd() -> None:
    """The reference splits the network after each block and uses ``torch.autograd.grad``."""
    torch.manual_seed(0)
    model = build_model("resnet8", 10, width=4).train()
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    found = measure.gradients_at_blocks(model, images, labels)
    assert list(found) == ["stage1_0", "stage2_0", "stage3_0"]
    names = [name for name, _ in model.named_children()]
    for name, norm in found.items():
        end = names.index(name) + 1
        value = model[:end](images).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model[end:](value * 1.0), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, value)
        assert norm == pytest.approx(float(gradient.flatten(1).norm(dim=1).mean()), rel=1e-4)


def test_only_shortcuts_blocks_the_gradient_of_plain_networks() -> None:
    torch.manual_seed(0)
    for family, passes in (("resnet", True), ("plain", False)):
        model = gradient_path.only_shortcuts(build_model(f"{family}20", 10, width=4).train())
        first, last = model.get_submodule("stage1_0"), model.get_submodule("stage1_2")
        x = torch.rand(2, 4, 8, 8, requires_grad=True)
        y = last(first(x))
        assert y.requires_grad is passes
    assert gradient_path.orders([100.0, 3.0, 1.0]) == pytest.approx(2)


def test_residual_block_is_the_plain_block_plus_x() -> None:
    found = depth.block_difference()
    assert found == {
        "lines_of_code": ["out += self.shortcut(x)"],
        "more_parameters": 0,
        "output_is_f_plus_x": True,
    }


def test_stacks_of_the_identity_study_keep_shapes_and_zero_gain_is_the_identity() -> None:
    x = identity.feature_maps(torch.rand(4, 3, 28, 28))
    assert x.shape == (4, identity.CHANNELS, 14, 14)
    assert x.min() == pytest.approx(0.25)  # positive, so the last ReLU is active
    assert x.max() == pytest.approx(1)
    for blocks in identity.DEPTHS:
        for kind in identity.KINDS:
            stack = identity.stack_of(kind, blocks, 0)
            assert len(stack) == blocks
            assert stack(x).shape == x.shape
    zero = identity.stack_of("residual, last gain 0", 3, 0).train()
    assert torch.equal(zero(x), x)
    assert identity.fit(zero, x, x, 1, 1e-3) == [0.0]


def test_operations_utilization_and_hours_match_arithmetic() -> None:
    """Krizhevsky's 90 epochs in 5 to 6 days on two GPUs of 1.58e12 operations per second."""
    flops = 0.724e9 * 2 * 3 * 1.281e6 * 90
    assert then.training_flops("alexnet2012") == pytest.approx(flops, rel=0.002)
    low, high = then.utilization(then.REPORTS[0])
    assert low == pytest.approx(flops / (2 * 1.581e12 * 6 * 86400), rel=0.002)
    assert high == pytest.approx(low * 6 / 5)
    assert then.hours_on("alexnet2012", 2, then.GTX580, low) == pytest.approx(144)


def test_decades_of_working_rates() -> None:
    grid, good, bad = [0.001, 0.01, 0.1, 1.0], 0.5, 2.0
    assert batch_norm.decades(grid, [bad, good, good, None]) == pytest.approx(2.0)
    assert batch_norm.decades(grid, [bad, good, bad, None]) == pytest.approx(1.0)
    assert batch_norm.decades(grid, [bad, None, None, bad]) == 0.0


def test_steps_to_goal_is_twice_the_length_if_not_reached() -> None:
    assert activation.steps_to_goal([16, 32, 48], [60.0, 25.0, 10.0]) == 32
    assert activation.steps_to_goal([16, 32, 48], [60.0, 40.0, 26.0]) == 96


def test_smooth_and_thinned_curves() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1, 2, 4, 6])
    assert smooth([1.0, 3.0], 9) == pytest.approx([1, 2])
    places, values = thinned(list(range(1, 1001)), 5)
    assert (places[0], places[-1], len(places)) == (1, 1000, 5)
    assert values == pytest.approx(places)


def _depth_figures(plain: tuple[float, float], residual: tuple[float, float]) -> Figures:
    losses = {
        "plain20": plain[0],
        "plain56": plain[1],
        "resnet20": residual[0],
        "resnet56": residual[1],
    }
    networks = {
        name: {"last_loss": mean_std([loss, loss + 0.01, loss + 0.02])}
        for name, loss in losses.items()
    }
    return {"block": depth.block_difference(), "networks": networks}


def test_verdicts_on_depth_follow_the_losses() -> None:
    def verdicts(*losses: tuple[float, float]) -> list[str]:
        return [claim.verdict for claim in depth.judge(_depth_figures(*losses))]

    assert verdicts((0.5, 0.9), (0.4, 0.3)) == [BORNE_OUT] * 4
    assert verdicts((0.5, 0.9), (0.3, 0.4)) == [BORNE_OUT, NOT_BORNE_OUT, BORNE_OUT, BORNE_OUT]
    assert verdicts((0.5, 0.4), (0.3, 0.3)) == [
        NOT_BORNE_OUT,
        NOT_BORNE_OUT,
        NOT_BORNE_OUT,
        BORNE_OUT,
    ]


def test_verdict_on_pool_head_allows_the_tolerance() -> None:
    parameters = {
        name: {head: pool_head.parameters(name, head=head) for head in pool_head.HEADS}
        for name in pool_head.NETWORKS
    }

    def verdict(*average: float) -> str:
        tops = {"tower": mean_std([90.0, 90.0, 90.0]), "average": mean_std(list(average))}
        return pool_head.judge({"parameters": parameters, "top1_percent": tops})[-1].verdict

    assert verdict(89.6, 89.8, 91.0) == BORNE_OUT
    assert verdict(89.4, 88.0, 89.0) == NOT_BORNE_OUT
    assert verdict(89.4, 90.0, 90.0) == UNDECIDED
