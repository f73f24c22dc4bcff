"""Training options that the reference grid combines with topologies, ZeRO stages and precisions."""

from typing import Any

Cell = dict[str, Any]

CLIP = {"no batch norm": 3.0, "batch norm": 2.5, "auxiliary heads": 6.0}
"""Maximum gradient norm by network; some of its steps exceed it and others do not."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer.name": "adamw"},
    "lars": {"optimizer.name": "lars", "optimizer.base_lr": 0.01},
    "lamb": {"optimizer.name": "lamb", "optimizer.base_lr": 0.0003},
}
"""Recipe keys by optimizer.

LARS changes a weight by a thousandth of its norm times the learning rate, but vectors without
weight decay by the learning rate itself: a larger one would amplify their rounding errors.
"""

SWITCHES: dict[str, dict[str, Any]] = {
    "clip": {},  # the maximum norm depends on the network
    "ema": {"ema": 0.9},
    "smoothing": {"train.label_smoothing": 0.1},
    "mix": {"augment.mixup": 0.2, "augment.cutmix": 1.0},
    "short": {},  # no recipe key: every fifth batch is short, as at the end of an epoch
    "spare": {"optimizer.decay_norm_and_bias": False},
    "sync": {"train.sync_batch_norm": True},
    "recompute": {"train.activation_checkpointing": True},
}
"""Recipe keys of each boolean option."""

OPTIONS = ("optimizer", *SWITCHES)

PRESETS: dict[str, Cell] = {
    "clip": {"clip": True},
    "adamw": {"optimizer": "adamw"},
    "adamw, clip": {"optimizer": "adamw", "clip": True},
    "ema": {"ema": True},
    "label smoothing": {"smoothing": True},
    "mixup and cutmix": {"mix": True},
    "short batches": {"short": True},
    "short batches, clip": {"short": True, "clip": True},
    "no decay of norms and biases, clip": {"spare": True, "clip": True},
    "synchronized batch norm": {"sync": True},
    "activation checkpointing": {"recompute": True},
    "lars": {"optimizer": "lars"},
    "lars, clip, no decay of norms and biases": {"optimizer": "lars", "clip": True, "spare": True},
    "lamb": {"optimizer": "lamb"},
    "lamb, clip, no decay of norms and biases": {"optimizer": "lamb", "clip": True, "spare": True},
    "all switches": dict.fromkeys(SWITCHES, True),
    "adamw, all switches": {"optimizer": "adamw"} | dict.fromkeys(SWITCHES, True),
}
"""Option sets that `make matrix` combines with every topology, ZeRO stage and precision.

The keys are their names in docs/matrix.md.
"""


def values_of(option: str) -> tuple[Any, ...]:
    return tuple(OPTIMIZERS) if option == "optimizer" else (False, True)


def option_of(cell: Cell, option: str) -> Any:
    """Return a cell's value of an option; the default is plain SGD."""
    return cell.get(option, "sgd" if option == "optimizer" else False)


def is_plain(cell: Cell) -> bool:
    return not any(option in cell for option in OPTIONS) and "compile" not in cell


def recipe_keys(cell: Cell) -> dict[str, Any]:
    """Return the recipe keys of a cell's options."""
    keys = dict(OPTIMIZERS[option_of(cell, "optimizer")])
    for option, more in SWITCHES.items():
        keys |= more if option_of(cell, option) else {}
    if option_of(cell, "clip"):
        keys["optimizer.clip_grad_norm"] = CLIP[cell["network"]]
    return keys | ({"train.compile": True} if cell.get("compile") else {})
