"""Recipes: what is refused, and how it is told."""

from pathlib import Path

import pytest

from trainer.config import known_keys, load_config
from trainer.errors import UserError
from trainer.recipe import RECIPES

GOOD = "model: {name: resnet8}\ndata: {train: /data/train}\ntrain: {epochs: 1}\n"


def _faults(tmp_path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(recipe), overrides)
    return error.value.faults


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_good_and_bears_its_files_name(path: Path) -> None:
    assert load_config(path.stem).name == path.stem


def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert _faults(tmp_path, GOOD + "optimizer: {momentun: 0.9}\n") == (
        "recipe.yaml: optimizer.momentun: unknown key; did you mean optimizer.momentum?",
    )
    # a key in the wrong section is found by its own name
    assert "did you mean data.workers?" in _faults(tmp_path, GOOD, "train.workers=2")[0]


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    wrong = ["batch.global_size=many", "schedule.name=linear", "data.wrokers=1", "nonsense", "train.epochs=0"]
    faults = _faults(tmp_path, GOOD, *wrong)
    assert len(faults) == 5
    text = "\n".join(faults)
    for part in (
        "'nonsense' is not of the form key=value",
        "batch.global_size: 'many' is wrong: input should be a valid integer",
        "schedule.name: 'linear' is wrong: input should be 'cosine', 'step', 'polynomial' or 'constant'",
        "data.wrokers: unknown key; did you mean data.workers?",
        "train.epochs: 0 is wrong: input should be greater than or equal to 1",
    ):
        assert part in text


def test_what_must_be_given(tmp_path: Path) -> None:
    needed = ("model", "data", "train")
    assert set(_faults(tmp_path, "name: x\n")) == {f"recipe.yaml: {section}: must be given" for section in needed}
    assert _faults(tmp_path, GOOD.replace("epochs: 1", "seed: 1")) == (
        "recipe.yaml: train.epochs or train.max_steps must be given",
    )


@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n- 2\n", "model: {name: a}\nmodel: {name: b}\n", "\xff"])
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_config(str(recipe))
    assert len(error.value.faults) == 1
    assert str(recipe) in str(error.value)


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="fashion-resnet8"):
        load_config("fashoin-resnet8")


def test_overrides_win_and_numbers_need_no_dot(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(GOOD)
    config = load_config(str(recipe), ["optimizer.weight_decay=5e-4", "optimizer.base_lr=1", "data.val=/data/val"])
    assert config.optimizer.weight_decay == pytest.approx(5e-4)
    assert config.optimizer.base_lr == 1.0
    assert config.flat()["data.val"] == "/data/val"


def test_every_key_has_a_unit_or_a_meaning_that_a_person_can_read() -> None:
    assert len(known_keys()) == len(set(known_keys()))
    assert {"model.name", "data.train", "batch.global_size", "optimizer.base_lr", "tracking.register_as"} <= set(known_keys())
