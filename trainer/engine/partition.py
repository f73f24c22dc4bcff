"""Assignment of layers to pipeline stages."""

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from trainer.errors import UserError


def layer_costs(model: nn.Sequential, image_size: int) -> dict[str, int]:
    """Return the cost of each layer's forward pass on one image.

    The cost is the number of multiply-adds plus one per output element.
    """
    costs = dict.fromkeys((name for name, _ in model.named_children()), 0)

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        costs[name] += output[0].numel() * (
            1 + (layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0)
        )

    meta = copy.deepcopy(model).to("meta").eval()
    for name, layer in meta.named_modules():
        if not list(layer.children()):
            owner = name.partition(".")[0]
            layer.register_forward_hook(
                lambda layer, _, output, owner=owner: count(owner, layer, output)
            )
    meta(torch.empty(1, 3, image_size, image_size, device="meta"))
    return costs


def assign_layers(
    costs: dict[str, int], stages: int, given: Sequence[str] | None = None
) -> list[list[str]]:
    """Return the names of the layers of each pipeline stage.

    Stages begin at the layers ``given``; without these, boundaries are chosen so that the cost of
    the most expensive stage is minimal.

    Raises UserError for more stages than layers, and for an invalid ``given``.
    """
    names = list(costs)
    if stages > len(names):
        raise UserError(
            f"parallel.pipeline_stages: {stages} is more than the {len(names)} layers of the model"
        )
    if given is not None:
        unknown = [name for name in given if name not in names[1:]]
        if unknown:
            valid = ", ".join(names[1:])
            raise UserError(
                f"parallel.split: {unknown[0]!r} cannot start a pipeline stage; valid "
                f"layers: {valid}"
            )
        cuts = [0, *(names.index(name) for name in given), len(names)]
        if cuts != sorted(set(cuts)) or len(cuts) != stages + 1:
            raise UserError(
                f"parallel.split: must name {stages - 1} layers in model order, for {stages} stages"
            )
    else:
        cuts = _balanced(list(costs.values()), stages)
    return [names[start:stop] for start, stop in pairwise(cuts)]


def validate_stage_boundaries(
    model: nn.Sequential, parts: list[list[str]], given: Sequence[str] | None
) -> None:
    """Raise UserError if a pipeline stage has no weights to train.

    ZeRO and bf16 optimizers cannot be created for such a stage.
    """
    layers = dict(model.named_children())
    for number, names in enumerate(parts):
        if not any(True for name in names for _ in layers[name].parameters()):
            key = "parallel.pipeline_stages" if given is None else "parallel.split"
            value = len(parts) if given is None else list(given)
            layer_range = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            advice = (
                "use fewer stages or set parallel.split"
                if given is None
                else "choose other layers to start its stages"
            )
            raise UserError(
                f"{key}: {value} leaves stage {number} ({layer_range}) without weights; {advice}"
            )


def _balanced(costs: Sequence[int], parts: int) -> list[int]:
    """Return the boundaries that split ``costs`` into ``parts`` non-empty contiguous ranges.

    The largest sum of a range is minimal. The boundaries include both ends.
    """
    sums = [0, *accumulate(costs)]
    best = {(1, stop): (sums[stop], [0, stop]) for stop in range(1, len(costs) + 1)}
    for count in range(2, parts + 1):
        for stop in range(count, len(costs) + 1):
            best[count, stop] = min(
                (
                    max(best[count - 1, cut][0], sums[stop] - sums[cut]),
                    [*best[count - 1, cut][1], stop],
                )
                for cut in range(count - 1, stop)
            )
    return best[parts, len(costs)][1]
