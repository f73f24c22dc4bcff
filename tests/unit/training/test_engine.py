"""Batch arithmetic, learning rates and losses, compared with torch and published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import OptimizerConfig, ScheduleConfig
from trainer.errors import UserError
from trainer.models import build_model
from trainer.training.batch_plan import plan_batches
from trainer.training.loss import count_correct, weighted_loss
from trainer.training.lr_schedule import learning_rate_schedule, scaled_learning_rate
from trainer.training.optimizers.build import build_optimizer, weight_groups


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_accumulation_steps_are_computed_from_batch_sizes(
    ranks: int, steps: int, micro: int
) -> None:
    plan = plan_batches(ranks * steps * micro, micro, ranks, samples=100_000)
    assert plan.accumulation_steps == steps
    assert plan.ranks * plan.accumulation_steps * plan.micro_size == plan.global_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, None, 8, 1000), "nearest valid sizes: 96 or 104"),
        ((96, 5, 8, 1000), "nearest valid sizes: 4 or 6; or use batch.global_size 80 or 120"),
        ((96, 7, 8, 1000), "nearest valid sizes: 6 or 12"),
        ((8, None, 8, 5), "8 ranks are more than the 5 samples"),
        ((64, None, 8, 50), "batch.global_size: 64 is more than the 50 samples"),
        ((4, None, 8, 1000), "nearest valid sizes: 8"),
    ],
)
def test_invalid_batch_size_error_names_the_nearest_valid_sizes(
    arguments: tuple, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_batches(*arguments)


def test_learning_rate_scales_linearly_with_batch_size() -> None:
    # Goyal et al. 2017: 0.1 at a batch of 256, so 3.2 at 8,192
    assert scaled_learning_rate(
        OptimizerConfig(base_lr=0.1, base_batch=256), 8192
    ) == pytest.approx(3.2)


def _rates(
    schedule: ScheduleConfig, peak: float = 1.6, steps_per_epoch: int = 10, steps: int = 90
) -> list[float]:
    """Return the learning rate of each step, for a global batch of sixteen times the base batch."""
    optimizer = OptimizerConfig(base_lr=peak / 16, base_batch=16)
    rate = learning_rate_schedule(schedule, optimizer, 256, steps_per_epoch, steps)
    return [rate(step) for step in range(steps)]


def _torch_rates(peak: float, steps: int, scheduler: str, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_warmup_and_cosine_decay_match_torchs_scheduler() -> None:
    rates = _rates(ScheduleConfig(name="cosine", warmup_epochs=2))
    assert rates[:20] == pytest.approx([1.6 * (s + 1) / 20 for s in range(20)])
    assert rates[20:] == pytest.approx(
        _torch_rates(1.6, 70, "CosineAnnealingLR", T_max=70), abs=1e-9
    )


def test_gradual_and_constant_warmup_match_goyal_et_al() -> None:
    """Section 2.2: gradual from the unscaled to the scaled rate; constant at the unscaled rate."""
    gradual = _rates(ScheduleConfig(name="constant", warmup_epochs=5, warmup_lr=0.1))
    assert gradual[:50] == pytest.approx([0.1 + 1.5 * (s + 1) / 50 for s in range(50)])
    assert gradual[50:] == [1.6] * 40
    constant = _rates(ScheduleConfig(name="constant", warmup_epochs=5, warmup="constant"))
    assert constant == pytest.approx([0.1] * 50 + [1.6] * 40)


def test_step_decay_matches_torchs_scheduler() -> None:
    rates = _rates(ScheduleConfig(name="step", milestones=[3.0, 6.0, 8.0]))
    assert rates == pytest.approx(
        _torch_rates(1.6, 90, "MultiStepLR", milestones=[30, 60, 80], gamma=0.1)
    )


def test_polynomial_decay_matches_torchs_scheduler() -> None:
    rates = _rates(ScheduleConfig(name="polynomial", power=3.0, warmup_epochs=1))
    assert rates[10:] == pytest.approx(
        _torch_rates(1.6, 80, "PolynomialLR", total_iters=80, power=3.0), abs=1e-9
    )


def test_invalid_warmups_are_rejected() -> None:
    with pytest.raises(UserError, match="50 steps, but the run has 40; use less than 4"):
        _rates(ScheduleConfig(warmup_epochs=5), steps=40)
    with pytest.raises(
        UserError, match=r"schedule\.warmup_lr: 2\.0 is above the peak learning rate of 1\.6"
    ):
        _rates(ScheduleConfig(warmup_epochs=5, warmup_lr=2.0))


def test_norms_and_biases_are_excluded_from_weight_decay_by_layer_type() -> None:
    model = build_model("resnet18", 10, width=8)
    config = OptimizerConfig(decay_norm_and_bias=False, weight_decay=0.1)
    decayed, free = (group["params"] for group in weight_groups(model, config))
    kinds = {id(p): type(m) for m in model.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in decayed} == {torch.nn.Conv2d, torch.nn.Linear}
    assert {kinds[id(p)].__name__ for p in free} == {"BatchNorm2d", "Linear"}
    assert len(decayed) + len(free) == len(list(model.parameters()))
    assert len(weight_groups(model, OptimizerConfig())) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_optimizer_updates_match_the_published_formulas(name: str) -> None:
    """Compare three steps with changing learning rate with the formula of the optimizer's paper."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    config = OptimizerConfig(name=name, weight_decay=0.01, momentum=0.9)
    optimizer = build_optimizer(layer, config, 0.1)
    weight, first, second = layer.weight.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    for step, rate in enumerate((0.1, 0.3, 0.05), start=1):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        layer.weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decayed = gradient + 0.01 * weight
        if name == "sgd":
            first = 0.9 * first + decayed
            weight = weight - rate * first
        elif name == "lars":  # You et al. 2017, algorithm 1, with the trust ratio on the gradient
            trust = 0.001 * weight.norm() / (gradient.norm() + 0.01 * weight.norm() + 1e-8)
            first = 0.9 * first + trust * decayed
            weight = weight - rate * first
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            epsilon = 1e-8 if name == "adamw" else 1e-6
            update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + epsilon)
            if name == "adamw":  # Loshchilov and Hutter 2019, algorithm 2
                weight = weight - rate * (update + 0.01 * weight)
            else:  # You et al. 2020, algorithm 2
                update = update + 0.01 * weight
                weight = weight - rate * weight.norm() / update.norm() * update
        assert torch.allclose(layer.weight, weight, rtol=1e-6), step


def test_sgd_needs_no_momentum_correction() -> None:
    """torch's momentum buffer does not contain the learning rate.

    A velocity that contains it must be scaled when it changes (Goyal et al. 2017, 3, remark 2).
    """
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    layer = torch.nn.Module()
    layer.weight = weight
    optimizer = build_optimizer(layer, OptimizerConfig(momentum=0.9, weight_decay=0.0), 1.0)
    expected, velocity, before = 0.0, 0.0, 1.0
    for rate in (1.0, 1.0, 0.1, 0.4):
        weight.grad = torch.ones(1, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        velocity = 0.9 * rate / before * velocity + rate  # equation 10, with the correction
        expected, before = expected - velocity, rate
        assert weight.item() == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_mean_over_micro_batches_equals_mean_over_samples(
    micro_batches: int, size: int, seed: int
) -> None:
    """Also if micro-batches have different numbers of samples without padding, or none."""
    torch.manual_seed(seed)
    logits = torch.randn(micro_batches, size, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (micro_batches, size))
    weights = (torch.rand(micro_batches, size) > 0.3).double()
    weights[0, 0] = 1
    real = weights.bool()
    expected = F.cross_entropy(logits[real].float(), labels[real])
    (want,) = torch.autograd.grad(expected, logits)
    parts = [
        weighted_loss(logits[i], labels[i], weights[i].float(), float(weights.sum()), micro_batches)
        for i in range(micro_batches)
    ]
    mean = torch.stack(parts).mean()
    (got,) = torch.autograd.grad(mean, logits)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(got, want, atol=1e-7)


def test_top1_and_top5_counts_match_torchs_topk() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1000, 12), torch.randint(0, 12, (1000,))
    top = logits.topk(5).indices
    want = [(top[:, 0] == labels).sum(), (top == labels[:, None]).any(1).sum(), 1000]
    assert count_correct(logits, labels).tolist() == [int(x) for x in want]
    assert count_correct(torch.zeros(3, 10), torch.tensor([0, 4, 5])).tolist() == [1, 2, 3], (
        "a tie goes to the lower class"
    )
    assert count_correct(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).tolist()[1:] == [4, 4], (
        "fewer than five classes"
    )
    assert not math.isnan(float(weighted_loss(logits, labels, torch.zeros(1000), 1.0, 1)))
