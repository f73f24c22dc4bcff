"""Batch arithmetic, learning rate, loss and counts, against plain torch and the formulas of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.engine.batch import plan_batches
from trainer.engine.objective import count_correct, weighted_loss
from trainer.engine.schedule import learning_rate_schedule, scaled_learning_rate
from trainer.errors import UserError


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_accumulation_steps_are_derived(ranks: int, steps: int, micro: int) -> None:
    plan = plan_batches(ranks * steps * micro, micro, ranks, samples=100_000)
    assert plan.accumulation_steps == steps
    assert plan.ranks * plan.accumulation_steps * plan.micro_size == plan.global_size


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((100, None, 8, 1000), "nearest that do: 96 or 104"),
        ((96, 5, 8, 1000), "nearest that do: 4 or 6; or batch.global_size 80 or 120"),
        ((96, 7, 8, 1000), "nearest that do: 6 or 12"),
        ((8, None, 8, 5), "8 ranks are more than the 5 samples"),
        ((64, None, 8, 50), "batch.global_size: 64 is more than the 50 samples"),
        ((4, None, 8, 1000), "nearest that do: 8"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(arguments: tuple, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan_batches(*arguments)


def test_the_linear_scaling_rule() -> None:
    # Goyal et al. 2017: 0.1 for 256, so 3.2 for 8k
    assert scaled_learning_rate(OptimizerConfig(base_lr=0.1, base_batch=256), 8192) == pytest.approx(3.2)


def test_warmup_then_cosine_equals_torchs_schedulers() -> None:
    rate = learning_rate_schedule(ScheduleConfig(name="cosine", warmup_epochs=2), 1.6, steps_per_epoch=10, total_steps=90)
    assert [rate(s) for s in range(20)] == pytest.approx([1.6 * (s + 1) / 20 for s in range(20)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70)
    for step in range(20, 90):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_step_decay_equals_torchs_scheduler() -> None:
    rate = learning_rate_schedule(ScheduleConfig(name="step", milestones=[3.0, 6.0, 8.0]), 0.1, 10, 90)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[30, 60, 80], gamma=0.1)
    for step in range(90):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="50 steps, but the run has 40; use less than 4"):
        learning_rate_schedule(ScheduleConfig(warmup_epochs=5), 0.1, 10, 40)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_the_mean_over_micro_batches_is_the_mean_over_samples(micro_batches: int, size: int, seed: int) -> None:
    """Also where micro-batches hold different numbers of real samples, one of them perhaps none."""
    torch.manual_seed(seed)
    logits = torch.randn(micro_batches, size, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (micro_batches, size))
    weights = (torch.rand(micro_batches, size) > 0.3).double()
    weights[0, 0] = 1
    real = weights.bool()
    expected = F.cross_entropy(logits[real].float(), labels[real])
    (want,) = torch.autograd.grad(expected, logits)
    parts = [
        weighted_loss(logits[i], labels[i], weights[i].float(), float(weights.sum()), micro_batches) for i in range(micro_batches)
    ]
    mean = torch.stack(parts).mean()
    (got,) = torch.autograd.grad(mean, logits)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(got, want, atol=1e-7)


def test_top1_and_top5_equal_torchs_topk() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1000, 12), torch.randint(0, 12, (1000,))
    top = logits.topk(5).indices
    want = [(top[:, 0] == labels).sum(), (top == labels[:, None]).any(1).sum(), 1000]
    assert count_correct(logits, labels).tolist() == [int(x) for x in want]
    assert count_correct(torch.zeros(3, 10), torch.tensor([0, 4, 5])).tolist() == [1, 2, 3], "a tie goes to the lower class"
    assert count_correct(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).tolist()[1:] == [4, 4], "fewer than five classes"
    assert not math.isnan(float(weighted_loss(logits, labels, torch.zeros(1000), 1.0, 1)))
