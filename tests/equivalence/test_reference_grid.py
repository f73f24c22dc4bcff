"""Every parallel configuration is compared with a single-process fp32 reference loop.

``make test`` trains a set of cells that covers each pair of values of topology, ZeRO stage,
precision, network and training options. ``make matrix`` trains every topology with default options,
and every preset of options on every topology for one network.
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
def test_every_topology_matches_the_reference_loop(ranks: int, trainings: Trainings) -> None:
    results = trainings.on(ranks)
    assert results
    assert not [d for d in map(deviation, results) if d]
    for result in results:
        if is_plain(result):
            assert result["losses"][-2] < result["losses"][0], "the loss decreases"


def test_grid_covers_options_with_stages_and_clipping_with_zero_stages_and_precisions() -> None:
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


def test_unsupported_zero_stage_combinations_are_rejected() -> None:
    def rejection(**values: object) -> str:
        return refusal({"stages": 1, "zero": 0, "precision": "fp32"} | values) or ""

    assert "cannot train with precision fp16" in rejection(precision="fp16")
    assert "cannot be combined with pipeline stages" in rejection(stages=2, zero=2)
    assert "cannot be combined with pipeline stages" in rejection(
        stages=2, zero=3, precision="fp16"
    )
    assert not rejection(stages=2, zero=1, precision="fp16")


# --- assignment of layers to stages -----------------------------------------------------------


def _all_splits(costs: list[int], stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        yield [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_split_minimizes_the_cost_of_the_costliest_stage(
    costs: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    parts = assign_layers({str(i): cost for i, cost in enumerate(costs)}, stages)
    assert [int(name) for part in parts for name in part] == list(range(len(costs)))
    assert all(parts)
    assert max(sum(costs[int(name)] for name in part) for part in parts) == min(
        map(max, _all_splits(costs, stages))
    )


@pytest.mark.parametrize("name", ["alexnet2012", "vgg11", "googlenet2014", "resnet18"])
def test_layer_costs_match_the_multiply_adds_of_the_network(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 1000)
    multiply_adds, _ = forward_costs(model, 224)
    costs = layer_costs(model, 224)
    assert list(costs) == [child for child, _ in model.named_children()]
    assert 1 <= sum(costs.values()) / multiply_adds < 1.03


def test_invalid_splits_are_rejected() -> None:
    costs = {"a": 1, "b": 2, "c": 3}
    assert assign_layers(costs, 2, ["b"]) == [["a"], ["b", "c"]]
    for stages, given_split, message in (
        (4, None, "4 is more than the 3 layers"),
        (2, ["a"], "'a' cannot start a pipeline stage; valid layers: b, c"),
        (3, ["c", "b"], "must name 2 layers in model order"),
        (3, ["b"], "must name 2 layers"),
    ):
        with pytest.raises(UserError, match=message):
            assign_layers(costs, stages, given_split)


def test_stages_without_weights_are_rejected() -> None:
    model = build_model("resnet8", 10, 16)
    costs = layer_costs(model, 16)
    validate_stage_boundaries(model, assign_layers(costs, 4), None)
    given = ["act", "stage1_0", "head"]
    with pytest.raises(
        UserError,
        match=r"parallel\.split: .* leaves stage 1 \(act\) without weights; choose other",
    ):
        validate_stage_boundaries(model, assign_layers(costs, 4, given), given)
    with pytest.raises(
        UserError,
        match=r"parallel\.pipeline_stages: 9 leaves stage 2 \(act\) without weights; "
        "use fewer stages",
    ):
        validate_stage_boundaries(model, assign_layers(costs, 9), None)
