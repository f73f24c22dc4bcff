"""Validation of recipes and its error messages."""

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.load import RECIPES
from trainer.config.schema import RunConfig, known_keys, load_config
from trainer.errors import UserError

GOOD = "model: {name: resnet8}\ndata: {train: /data/train}\ntrain: {epochs: 1}\n"


def _faults(tmp_path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(recipe), overrides)
    return error.value.faults


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_named_after_their_files(path: Path) -> None:
    assert load_config(path.stem).name == path.stem


def test_unknown_key_is_rejected_with_the_nearest_known_key(tmp_path: Path) -> None:
    assert _faults(tmp_path, GOOD + "optimizer: {momentun: 0.9}\n") == (
        "recipe.yaml: optimizer.momentun: unknown key; did you mean optimizer.momentum?",
    )
    # a key in the wrong section is found by its last part
    assert "did you mean data.workers?" in _faults(tmp_path, GOOD, "train.workers=2")[0]


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    invalid = [
        "batch.global_size=many",
        "schedule.name=linear",
        "data.wrokers=1",
        "nonsense",
        "train.epochs=0",
    ]
    faults = _faults(tmp_path, GOOD, *invalid)
    assert len(faults) == 5
    text = "\n".join(faults)
    for part in (
        "'nonsense' is not of the form key=value",
        "batch.global_size: 'many' is invalid: input should be a valid integer",
        "schedule.name: 'linear' is invalid: input should be 'cosine', 'step', 'polynomial' or "
        "'constant'",
        "data.wrokers: unknown key; did you mean data.workers?",
        "train.epochs: 0 is invalid: input should be greater than or equal to 1",
    ):
        assert part in text


def test_missing_required_keys_are_named(tmp_path: Path) -> None:
    needed = ("model", "data", "train")
    assert set(_faults(tmp_path, "name: x\n")) == {
        f"recipe.yaml: {section}: must be given" for section in needed
    }
    assert _faults(tmp_path, GOOD.replace("epochs: 1", "seed: 1")) == (
        "recipe.yaml: train.epochs or train.max_steps must be given",
    )


@pytest.mark.parametrize(
    "text", ["a: [1\n", "- 1\n- 2\n", "model: {name: a}\nmodel: {name: b}\n", "\xff"]
)
def test_invalid_recipe_file_is_one_error(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_config(str(recipe))
    assert len(error.value.faults) == 1
    assert str(recipe) in str(error.value)


def test_unknown_recipe_error_names_shipped_recipes() -> None:
    with pytest.raises(UserError, match="fashion-resnet8"):
        load_config("fashoin-resnet8")


def test_overrides_take_precedence_and_floats_need_no_dot(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(GOOD)
    config = load_config(
        str(recipe), ["optimizer.weight_decay=5e-4", "optimizer.base_lr=1", "data.val=/data/val"]
    )
    assert config.optimizer.weight_decay == pytest.approx(5e-4)
    assert config.optimizer.base_lr == 1.0
    assert config.flat()["data.val"] == "/data/val"


def test_known_keys_are_unique() -> None:
    assert len(known_keys()) == len(set(known_keys()))
    assert {
        "model.name",
        "data.train",
        "batch.global_size",
        "optimizer.base_lr",
        "tracking.register_as",
    } <= set(known_keys())


def _numbers(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas of all numbers in a field's schema."""
    if "$ref" in schema:
        return
    if schema.get("type") in ("integer", "number"):
        yield schema
    for part in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        yield from _numbers(part, definitions)


def _numeric_keys() -> list[tuple[str, dict[str, Any], bool]]:
    """Return each numeric key, the schema of its numbers, and whether it takes a list of them."""
    schema = RunConfig.model_json_schema()
    found = []
    for key in known_keys():
        section, _, leaf = key.rpartition(".")
        name = RunConfig.model_fields[section].annotation.__name__ if section else ""
        field = (schema["$defs"][name] if section else schema)["properties"][leaf]
        found += [(key, number, "items" in field) for number in _numbers(field, schema["$defs"])]
    return found


NUMERIC = _numeric_keys()


def test_numeric_keys_are_found() -> None:
    keys = {key for key, _, _ in NUMERIC}
    assert {
        "optimizer.base_lr",
        "optimizer.betas",
        "data.mean",
        "ema",
        "train.hang_minutes",
    } <= keys
    assert len(keys) > 50


@pytest.mark.parametrize(("key", "schema", "is_list"), NUMERIC, ids=[key for key, _, _ in NUMERIC])
def test_numeric_values_are_finite_and_bounded(
    key: str, schema: dict[str, Any], is_list: bool
) -> None:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    assert low is not None
    assert high is not None
    assert 0 <= low < high <= (2**64 if schema["type"] == "integer" else 1e30)
    length = 2 if key == "optimizer.betas" else 3
    for text in (".inf", "-.inf", ".nan", "-1", str(10**31), "1e400", "-1e300", "true", "'1'"):
        value = f"[{', '.join([text] * length)}]" if is_list else text
        with pytest.raises(UserError, match=key):
            load_config("digits-resnet8", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("batch.global_size=010", "octal or sexagesimal"),
        ("train.epochs=1:30", "octal or sexagesimal"),
        ("optimizer={base_lr: 1, base_lr: 2}", "is duplicated"),
        ("optimizer={on: 1}", "put it in quotes"),
        ("name=on", "put it in quotes"),
        ("data.train=0b_", "is not a number"),
        ("train.seed=" + "9" * 5000, "is not a number"),
        ("name=!!bool maybe", "does not match its tag"),
        ("name=!!python/object:os.system x", "could not determine a constructor"),
        ("name=*unknown", "undefined alias"),
        ("name=" + "[" * 200 + "]" * 200, "nested"),
        ("name=&a [*a]", "nested"),
        ("train.output_dir=", "put it in quotes"),
        ("train.output_dir=''", "must not be empty"),
        ("train.output_dir=~/runs", "write the full path"),
        ("train.output_dir=s3://bucket/x", "not a URL"),
        ("train.output_dir=runs/{date}", "the only one is {name}"),
        ('train.output_dir="a\\0b"', "control character"),
        ("checkpoint.url=s3://b/{name}", "write the name"),
        ("data.cache_dir=s3://b/cache", "not a URL"),
        ("tracking.register_as=' '", "must not be empty"),
        ("tracking.experiment=" + "x" * 501, "500 characters"),
        ("optimizer={nesterov: true, momentum: 0}", "needs a momentum above 0"),
        ("schedule.milestones=[60, 30]", "must ascend"),
        ("optimizer.betas=[0.9, 1]", "less than 1"),
        ("data.mean=[123.7, 0, 0]", "less than or equal to 1"),
        ("data.std=[0, 1, 1]", "greater than or equal to 0.001"),
        ("augment.mixup=1e-300", "at least 0.001"),
        ("augment.padding=8", "8 must be less than the image size of 8 pixels"),
        ("train=5", "valid dictionary"),
        ("model.name.x=1", "is a value, not a section"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_value_is_one_error_with_key_and_reason(override: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("digits-resnet8", [override])
    assert len(error.value.faults) == 1
    assert reason in error.value.faults[0]
    assert override.partition("=")[0].partition(".")[0] in error.value.faults[0]
    assert len(error.value.faults[0]) < 600


def test_numbers_and_dates_are_parsed_as_in_yaml_1_2() -> None:
    config = load_config(
        "digits-resnet8",
        [
            "optimizer.weight_decay=1e-4",
            "data.shuffle_window=1_000",
            "name=2024-01-31",
            "augment.flip=off",
        ],
    )
    assert (config.optimizer.weight_decay, config.data.shuffle_window) == (1e-4, 1000)
    assert (config.name, config.augment.flip) == ("2024-01-31", False)


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n", "contains a list"),
        (b"model:\n\tname: x\n", "is not YAML"),
        ("name: é".encode("latin-1"), "is not YAML"),
        (GOOD.encode("utf-16"), "is not YAML"),
        (b"a: 1\n---\nb: 2\n", "is not YAML"),
        (b"1: 2\n", "put it in quotes"),
        (b"? [a, b]\n: c\n", "a key must be text"),
        (_BOMB.encode(), "after alias expansion"),
        (b"name: " + b"x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_unusable_recipe_file_is_one_error_with_its_path(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        load_config(str(recipe))
    assert str(recipe) in str(error.value)


@pytest.mark.parametrize("change", [("", "\ufeff"), ("\n", "\r\n")])
def test_byte_order_marks_and_windows_line_endings_are_accepted(
    tmp_path: Path, change: tuple[str, str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = change[1] + GOOD if change[0] == "" else GOOD.replace(*change)
    recipe.write_bytes(text.encode())
    assert load_config(str(recipe)).model.name == "resnet8"


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("/tmp", "is a folder"),
        ("s3://bucket/recipe.yaml", "is a URL"),
        ("/dev/zero", "neither a file"),
        ("a\0b", "neither a file"),
        ("x" * 5000, "is not a file"),
    ],
)
def test_path_that_is_not_a_recipe_file_is_rejected(recipe: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_config(recipe)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*known_keys(), "model", "optimizer", "data.mean.0", "no.such", ""]),
            st.one_of(
                st.text(max_size=20),
                st.floats().map(repr),
                st.integers().map(str),
                st.sampled_from(
                    ["[]", "{}", "[[1]]", "{a: {b: 1}}", "!!set {a}", "~", "&a *a", "<<", "="]
                ),
            ),
        ),
        max_size=3,
    )
)
def test_any_override_is_accepted_or_raises_user_error(pairs: list[tuple[str, str]]) -> None:
    with suppress(UserError):
        load_config("digits-resnet8", [f"{key}={value}" for key, value in pairs])
