"""Describes recipes: each key with its type and default, and the run plan of a recipe."""

import re
from dataclasses import dataclass
from typing import Any

from trainer.config.load import RECIPES
from trainer.config.run_plan import check_config, run_length, split_ranks
from trainer.config.schema import RunConfig, load_config
from trainer.data.index import Index, open_index
from trainer.errors import RetryableError, UserError
from trainer.training.lr_schedule import learning_rate_schedule, scaled_learning_rate

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_CURVE_POINTS = 64
_ANY_CLASSES = 1000
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class KeyInfo:
    """A recipe key.

    ``default`` is None for a required key and for a key whose default is null.
    """

    key: str
    type: str
    required: bool
    default: Any
    description: str


@dataclass(frozen=True)
class RecipePlan:
    """Sizes, steps and learning rates of a run on ``ranks`` ranks.

    ``learning_rates`` holds pairs of an optimizer step, counted from 0, and its learning rate.
    """

    parameters: int
    multiply_adds: int
    ranks: int
    data_parallel_ranks: int
    pipeline_stages: int
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    samples: int
    steps_per_epoch: int
    epochs: int | None
    steps: int
    peak_learning_rate: float
    learning_rates: list[tuple[int, float]]


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors that validate and complete YAML."""
    return {"$schema": _DIALECT, **RunConfig.model_json_schema(), "title": "Convoy recipe"}


def recipe_keys(prefix: str = "") -> list[KeyInfo]:
    """Return the keys that start with ``prefix``, in schema order.

    Raises UserError if there are none.
    """
    schema = recipe_schema()
    keys = _keys_of(schema, schema["$defs"], "")
    found = [key for key in keys if key.key.startswith(prefix)]
    if not found:
        sections = sorted({key.key.partition(".")[0] for key in keys})
        raise UserError(
            f"no recipe key starts with {prefix!r}; sections and keys: {', '.join(sections)}"
        )
    return found


def _keys_of(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[KeyInfo]:
    keys: list[KeyInfo] = []
    for name, node in section["properties"].items():
        target = node.get("$ref", "").removeprefix("#/$defs/")
        if target:
            keys += _keys_of(definitions[target], definitions, f"{prefix}{name}.")
        else:
            required = name in section.get("required", [])
            description = " ".join(node.get("description", "").split())
            keys.append(
                KeyInfo(prefix + name, _type_of(node), required, node.get("default"), description)
            )
    return keys


def _type_of(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_type_of(option) for option in node["anyOf"])
    if "enum" in node:
        return " or ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    kind = str(node.get("type", "any"))
    if kind == "array":
        return (
            f"list of {_type_of(node.get('items') or next(iter(node.get('prefixItems', [])), {}))}"
        )
    if kind in ("integer", "number"):
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        limits = [f"{sign} {node[name]:,}" for name, sign in signs.items() if name in node]
        return f"{kind} {' and '.join(limits)}".rstrip()
    return kind


def shipped_recipes() -> dict[str, str]:
    """Return the shipped recipes, each with the first sentence of its header comment."""
    return {
        path.stem: _first_sentence(path.read_text(encoding="utf-8"))
        for path in sorted(RECIPES.glob("*.yaml"))
    }


def _first_sentence(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(lines))[0]


def plan_recipe(
    recipe: str, overrides: list[str], ranks: int, samples: int | None
) -> tuple[RunConfig, RecipePlan]:
    """Return the full configuration and the run plan.

    ``samples``: size of the training split; read from its index if None. Raises UserError that
    lists every error.
    """
    config = load_config(recipe, overrides)
    check_config(config)
    num_classes = config.model.num_classes
    if samples is None:
        index = _training_index(config)
        samples, num_classes = index.samples, num_classes or len(index.classes)
    parameters, multiply_adds = _model_size(config, num_classes or _ANY_CLASSES)
    batch = split_ranks(config, ranks, samples)
    per_epoch, total, steps = run_length(config, batch.global_size, samples)
    rate = learning_rate_schedule(
        config.schedule, config.optimizer, batch.global_size, per_epoch, total
    )
    sampled = sorted({round(i * (steps - 1) / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)})
    return config, RecipePlan(
        parameters=parameters,
        multiply_adds=multiply_adds,
        ranks=ranks,
        data_parallel_ranks=batch.ranks,
        pipeline_stages=config.parallel.pipeline_stages,
        global_batch_size=batch.global_size,
        micro_batch_size=batch.micro_size,
        accumulation_steps=batch.accumulation_steps,
        samples=samples,
        steps_per_epoch=per_epoch,
        epochs=config.train.epochs,
        steps=steps,
        peak_learning_rate=scaled_learning_rate(config.optimizer, batch.global_size),
        learning_rates=[(step, rate(step)) for step in sampled],
    )


def _training_index(config: RunConfig) -> Index:
    try:
        return open_index(config.data.train)[0]
    except (UserError, RetryableError) as error:
        raise UserError(str(error), "pass --samples N to plan without the dataset") from None


def _model_size(config: RunConfig, num_classes: int) -> tuple[int, int]:
    """Return the parameters, and the multiply-adds per image at ``data.image_size``."""
    import torch

    from trainer.export.exported_model import ModelMetadata
    from trainer.models.model_info import forward_costs

    with torch.device("meta"):
        model = ModelMetadata.of(config, [], num_classes).build()
    multiply_adds, _ = forward_costs(model, config.data.image_size)
    return sum(parameter.numel() for parameter in model.parameters()), multiply_adds


def sparkline(values: list[float]) -> str:
    """Render one character per value, scaled to the largest value."""
    top = max(values) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in values)
