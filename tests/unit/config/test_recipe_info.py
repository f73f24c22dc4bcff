"""``convoy recipe``, compared with a JSON Schema validator, torchvision and torch's schedulers."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from jsonschema import Draft202012Validator
from support.helpers import RunText

from pipelines.cli.recipe_info import plan_recipe, recipe_keys, recipe_schema, shipped_recipes
from trainer.config.load import RECIPES, read_recipe
from trainer.config.schema import known_keys, load_config
from trainer.errors import UserError

IMAGENET = 1_281_167


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_satisfy_the_schema(path: Path) -> None:
    Draft202012Validator.check_schema(recipe_schema())
    assert list(Draft202012Validator(recipe_schema()).iter_errors(read_recipe(path))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.momentun", 0.9),
        ("data.image_size", "large"),
        ("train.epochs", 0),
        ("precision", "fp8"),
        ("batch", 3),
    ],
)
def test_schema_rejects_what_the_trainer_rejects(key: str, value: object) -> None:
    recipe = read_recipe(RECIPES / "resnet50.yaml")
    section, _, name = key.rpartition(".")
    (recipe.setdefault(section, {}) if section else recipe)[name] = value
    assert list(Draft202012Validator(recipe_schema()).iter_errors(recipe))
    with pytest.raises(UserError, match=key):
        load_config("resnet50", [f"{key}={json.dumps(value)}"])


def test_recipe_keys_match_the_configuration_and_its_defaults() -> None:
    keys = recipe_keys()
    assert [key.key for key in keys] == known_keys()
    minimal = load_config("resnet50").model_dump()
    defaults = type(load_config("resnet50"))(
        model={"name": "resnet50"}, data={"train": "x"}, train={"epochs": 1}
    ).flat()  # type: ignore[arg-type]
    assert minimal.keys() == {key.key.partition(".")[0] for key in keys}
    given = {"model.name", "data.train", "train.epochs"}
    assert {key.key: key.default for key in keys if key.key not in given} == {
        key: value for key, value in defaults.items() if key not in given
    }
    assert {key.key for key in keys if key.required} == {"model.name", "data.train"}
    assert [key.key for key in keys if not key.description] == []


def test_plan_matches_torchvision_and_torchs_schedulers() -> None:
    config, plan = plan_recipe("resnet50", ["batch.global_size=8192"], ranks=256, samples=IMAGENET)
    model = torchvision.models.resnet50()
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.data_parallel_ranks) == (
        32,
        1,
        256,
    )
    assert plan.steps_per_epoch == -(-IMAGENET // 8192)
    assert plan.steps == 90 * plan.steps_per_epoch
    warmup = 5 * plan.steps_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * 8192 / 256)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1),
            torch.optim.lr_scheduler.MultiStepLR(
                optimizer, [(e - 5) * plan.steps_per_epoch for e in (30, 60, 80)], 0.1
            ),
        ],
        [warmup],
    )
    rates = dict(plan.learning_rates)
    for step in range(plan.steps):
        if step in rates:
            assert rates.pop(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()
    assert not rates
    assert config.batch.global_size == 8192


def test_plan_reads_the_number_of_samples_from_the_index(digits: Path) -> None:
    _, plan = plan_recipe("digits-resnet8", [f"data.train={digits}/train"], ranks=2, samples=None)
    assert (plan.samples, plan.steps_per_epoch, plan.accumulation_steps) == (600, 10, 2)


def test_recipe_commands_print_plans_and_reject_unknown_keys(
    convoy_ok: RunText, convoy_refuses: RunText, tmp_path: Path
) -> None:
    assert shipped_recipes().keys() == {path.stem for path in RECIPES.glob("*.yaml")}
    shown = convoy_ok("recipe", "show", "resnet50", "--ranks", 8, "--samples", IMAGENET)
    assert "25,557,032 parameters" in shown
    assert "90 epochs, 450,450 steps" in shown
    stderr = convoy_refuses("recipe", "show", "digits-resnet8", f"data.train={tmp_path}/none")
    assert stderr.splitlines()[-1] == "convoy: pass --samples N to plan without the dataset"
    assert "no recipe key starts with 'optimiser'" in convoy_refuses("recipe", "keys", "optimiser")
