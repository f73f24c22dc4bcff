"""Every way to spread a training over ranks follows one plain loop in fp32: the same algorithm at
every scale.

``make test`` trains a set of cells in which each pair of values of topology, ZeRO stage, precision,
network and training options occurs; ``make matrix`` trains every topology plainly, and every preset
of options on every topology for one network.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from grid_options import OPTIONS, SWITCHES, is_plain, option_of, values_of
from hypothesis import given
from hypothesis import strategies as st
from reference_grid import Trainings, allowed_cells, covering, deviation, refusal

from trainer.engine.partition import assign_layers, layer_costs, validate_stage_boundaries
from trainer.errors import UserError
from trainer.models import build_model
from trainer.models.model_info import forward_costs


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_topology_follows_the_plain_loop(ranks: int, trainings: Trainings) -> None:
    results = trainings.on(ranks)
    assert results
    assert not [d for d in map(deviation, results) if d]
    for result in results:
        if is_plain(result):
            assert result["losses"][-2] < result["losses"][0], "and it learns"


def test_every_option_is_trained_with_stages_and_clipping_with_every_zero_stage_and_precision() -> (
    None
):
    chosen = covering()
    for option in OPTIONS:
        for value in values_of(option):
            for other in (1, 2, 4):
                assert any(
                    c["stages"] == other and option_of(c, option) == value for c in chosen
                ), (option, value, other)
    for a, b in itertools.combinations(SWITCHES, 2):
        assert any(option_of(c, a) and option_of(c, b) for c in chosen), (a, b)
    parallel = ("stages", "zero", "precision")
    clipped = {tuple(c[key] for key in parallel) for c in chosen if option_of(c, "clip")}
    assert clipped == {tuple(c[key] for key in parallel) for c in allowed_cells()}


def test_what_does_not_learn_or_cannot_work_is_refused() -> None:
    def refused(**values: object) -> str:
        return refusal({"stages": 1, "zero": 0, "precision": "fp32"} | values) or ""

    assert "does not learn with precision fp16" in refused(precision="fp16")
    assert "does not go with pipeline stages" in refused(stages=2, zero=2)
    assert "does not go with pipeline stages" in refused(stages=2, zero=3, precision="fp16")
    assert not refused(stages=2, zero=1, precision="fp16")


# --- how layers are split
# ---------------------------------------------------------------------------------------------


def _all_splits(costs: list[int], stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        yield [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_no_split_has_a_cheaper_costliest_stage(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    parts = assign_layers({str(i): cost for i, cost in enumerate(costs)}, stages)
    assert [int(name) for part in parts for name in part] == list(range(len(costs)))
    assert all(parts)
    assert max(sum(costs[int(name)] for name in part) for part in parts) == min(
        map(max, _all_splits(costs, stages))
    )


@pytest.mark.parametrize("name", ["alexnet2012", "vgg11", "googlenet2014", "resnet18"])
def test_costs_hold_the_networks_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 1000)
    multiply_adds, _ = forward_costs(model, 224)
    costs = layer_costs(model, 224)
    assert list(costs) == [child for child, _ in model.named_children()]
    assert 1 <= sum(costs.values()) / multiply_adds < 1.03


def test_splits_that_are_none_are_refused() -> None:
    costs = {"a": 1, "b": 2, "c": 3}
    assert assign_layers(costs, 2, ["b"]) == [["a"], ["b", "c"]]
    for stages, given_split, told in (
        (4, None, "4 is more than the 3 layers"),
        (2, ["a"], "'a' is no layer that a stage can begin with; those: b, c"),
        (3, ["c", "b"], "must name 2 layers in their order"),
        (3, ["b"], "must name 2 layers"),
    ):
        with pytest.raises(UserError, match=told):
            assign_layers(costs, stages, given_split)


def test_stages_without_weights_are_refused() -> None:
    model = build_model("resnet8", 10, 16)
    costs = layer_costs(model, 16)
    validate_stage_boundaries(model, assign_layers(costs, 4), None)
    given = ["act", "stage1_0", "head"]
    with pytest.raises(
        UserError,
        match=r"parallel\.split: .* leaves stage 1 \(act\) without weights; move the layers",
    ):
        validate_stage_boundaries(model, assign_layers(costs, 4, given), given)
    with pytest.raises(
        UserError,
        match=r"parallel\.pipeline_stages: 9 leaves stage 2 \(act\) without weights; use fewer stages",
    ):
        validate_stage_boundaries(model, assign_layers(costs, 9), None)
