"""The values that the studies of training at scale compute, against independent calculations."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from pipelines.studies.experiments import (
    accumulation,
    data_parallel,
    mixed_precision,
    model_parallel,
    size_and_skill,
)
from pipelines.studies.framework import measure
from trainer.models.model_info import model_info


@pytest.mark.parametrize("name", model_parallel.NETWORKS)
def test_stages_together_hold_the_parameters_and_activations_of_the_network(name: str) -> None:
    """The last stage holds the activations of one micro-batch, the one before of two, and so on."""
    entry = model_info(name)
    for stages in model_parallel.STAGES:
        rows = model_parallel.stage_memory(name, stages)
        assert len(rows) == stages
        assert sum(row["parameters"] for row in rows) == entry.parameters
        one_each = sum(row["activations_mib"] / (stages - place) for place, row in enumerate(rows))
        expected = entry.activation_bytes * model_parallel.MICRO / 2**20
        assert one_each == pytest.approx(
            expected, rel=0.1 if stages > 1 else 1e-3
        )  # both stages save the activation at their boundary
        assert one_each >= expected * 0.999
    assert rows[0]["weights_mib"] == pytest.approx(rows[0]["parameters"] * 12 / 2**20, abs=0.1)


def test_bubble_matches_an_explicit_schedule() -> None:
    """GPipe's schedule: micro-batch m is on stage s at slot m + s; idle slots are the bubble."""
    for stages, micro_batches in ((1, 8), (2, 8), (4, 8), (4, 1)):
        busy = {(m + s, s) for m in range(micro_batches) for s in range(stages)}
        slots = stages * (1 + max(slot for slot, _ in busy))
        assert model_parallel.bubble(stages, micro_batches) == pytest.approx(1 - len(busy) / slots)


def test_ring_all_reduce_time_matches_its_rounds() -> None:
    """Each of N ranks sends 1/N of the data in each of 2 (N - 1) rounds, all at the same time."""
    for ranks in (1, 2, 5, 8):
        rounds = 2 * (ranks - 1)
        seconds = sum(1e-5 + (1000 / ranks) / 1e6 for _ in range(rounds))
        assert data_parallel.ring(ranks, 1000, 1e-5, 1e6) == pytest.approx(seconds)


def test_link_of_recovers_latency_and_bandwidth() -> None:
    latency, bandwidth = 3e-5, 2e9
    seconds = {size: data_parallel.ring(2, size, latency, bandwidth) for size in (4, 2**16, 2**24)}
    assert data_parallel.link_of(seconds) == pytest.approx((latency, bandwidth), rel=1e-3)


def test_efficiency_matches_arithmetic() -> None:
    """32 images at 138 per second take 232 ms; 102 MB over a ring of 32 servers at 6.25 GB/s take
    32 ms, and 62 messages 1.2 ms.
    """
    assert data_parallel.efficiency(8) == {"after": 1.0, "under": 1.0}
    found = data_parallel.efficiency(256)
    assert found["after"] == pytest.approx(232 / (232 + 31.7 + 1.2), abs=0.003)
    assert found["under"] == 1.0
    assert data_parallel.efficiency(512)["after"] < found["after"]


def test_gradients_lost_in_fp16_match_numpy() -> None:
    values = np.float32(2.0) ** np.arange(-40, -10, dtype=np.float32)
    zeros = float((values.astype(np.float16) == 0).mean())
    assert mixed_precision.lost(torch.from_numpy(values), 1.0) == pytest.approx(zeros)
    assert zeros == pytest.approx(np.mean(values <= mixed_precision.LEAST_FP16))
    assert mixed_precision.lost(torch.from_numpy(values), mixed_precision.SCALE) == 0.0


def test_output_gradients_match_the_formula_of_cross_entropy() -> None:
    """The gradient in the logits is (probabilities - 1 at the label) / images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images, labels = torch.randn(3, 3, 2, 2), torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = (model(images).softmax(1) - nn.functional.one_hot(labels, 5)) / 3
    (found,) = measure.output_gradients(model, images, labels)
    torch.testing.assert_close(found, expected)


def test_fp16_activations_need_about_half_the_memory() -> None:
    full, half = (
        mixed_precision.activation_mib("vgg16", dtype) for dtype in (torch.float32, torch.float16)
    )
    assert full == pytest.approx(model_info("vgg16").activation_bytes / 2**20)
    assert 0.5 <= half / full < 0.7  # pooling saves 64-bit indices


def test_rank_correlation_matches_scipy() -> None:
    a, b = [3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 2.0, 5.0, 4.0, 3.0]
    assert size_and_skill.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert size_and_skill.rank_correlation(a, [-x for x in a]) == pytest.approx(-1)


def test_published_errors_match_the_sources() -> None:
    table = size_and_skill.published()
    assert table["vgg16"]["paper_top5_error"] == 8.1
    assert table["resnet50"]["torchvision_top5_error"] == pytest.approx(
        7.138
    )  # 92.862% of IMAGENET1K_V1
    assert "resnet8" not in table


def test_activation_memory_is_proportional_to_the_micro_batch() -> None:
    assert accumulation.activation_mib(512) == pytest.approx(16 * accumulation.activation_mib(32))
