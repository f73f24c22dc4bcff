"""The recipes of the warmup and linear-scaling experiment: the rates that they come to, and that nothing else differs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trainer.config import RECIPES, RunConfig, load_config
from trainer.engine.schedule import learning_rate_schedule

ROOT = Path(__file__).parents[2]
IMAGES, EPOCHS = 60_000, 4

# recipe: batch, peak rate, steps of warmup, rate of the first step
EXPECTED = {
    "warmup-64": (64, 0.025, 0, 0.025),
    "warmup-512": (512, 0.2, 117, 0.025 + 0.175 / 117),
    "warmup-512-unscaled": (512, 0.025, 0, 0.025),
    "warmup-64-fast": (64, 0.1, 0, 0.1),
    "warmup-512-fast": (512, 0.8, 117, 0.1 + 0.7 / 117),
    "warmup-512-cold": (512, 0.8, 0, 0.8),
}


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """The benchmark, which is a program and no package."""
    specification = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["scaling"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _rates(config: RunConfig) -> list[float]:
    """Of every step of a run on Fashion-MNIST, whose last images fill no batch."""
    per_epoch = IMAGES // config.batch.global_size
    rate = learning_rate_schedule(config.schedule, config.optimizer, config.batch.global_size, per_epoch, EPOCHS * per_epoch)
    return [rate(step) for step in range(EPOCHS * per_epoch)]


@pytest.mark.parametrize("recipe", EXPECTED)
def test_rates(recipe: str) -> None:
    batch, peak, warmup, first = EXPECTED[recipe]
    config = load_config(recipe)
    assert config.batch.global_size == batch
    assert (config.train.epochs, config.data.tail) == (EPOCHS, "drop")
    rates = _rates(config)
    assert max(rates) == pytest.approx(peak)
    assert rates[0] == pytest.approx(first)
    climbs = int(np.argmax(np.isclose(rates, peak)))  # the peak is reached by warmup's last step
    assert climbs == max(0, warmup - 1)
    assert np.all(np.diff(rates[:warmup]) > 0)
    assert np.all(np.diff(rates[warmup:]) < 0)
    assert rates[-1] < peak / 1000


def test_the_rows_differ_in_batch_rate_and_warmup_alone() -> None:
    """Batch norm's micro-batch is the same in all, so that the loss is the same function (Goyal et al. 2017, 2.3)."""
    free = {
        "name",
        "batch.global_size",
        "optimizer.base_lr",
        "optimizer.base_batch",
        "schedule.warmup_epochs",
        "schedule.warmup_lr",
    }
    rest = [{key: value for key, value in load_config(recipe).flat().items() if key not in free} for recipe in EXPECTED]
    assert all(other == rest[0] for other in rest)
    assert rest[0]["batch.micro_size"] == 64


def test_the_benchmark_runs_all_of_them(scaling: ModuleType) -> None:
    assert sorted(scaling.RECIPES) == sorted(EXPECTED) == sorted(path.stem for path in RECIPES.glob("warmup-*.yaml"))
    assert {recipe for claim in scaling.CLAIMS for recipe in claim[:2]} == set(EXPECTED)


def test_claims_are_judged_seed_by_seed(scaling: ModuleType) -> None:
    top1 = {
        "warmup-64": [91.0, 91.2],
        "warmup-512": [91.1, 91.1],  # once above, once below
        "warmup-512-unscaled": [89.0, 89.0],
        "warmup-64-fast": [91.0, 91.0],
        "warmup-512-fast": [90.0, 90.5],  # below twice
        "warmup-512-cold": [90.5, 89.0],
    }
    nothing = np.zeros((2, 1))
    verdicts = scaling.judge({name: scaling.Row(load_config(name), nothing, nothing, values) for name, values in top1.items()})
    assert [verdict["holds"] for verdict in verdicts] == [True, True, False, False]
    assert verdicts[1]["differences_points"] == [2.1, 2.1]
    assert verdicts[2]["mean_difference"] == -0.75


def test_a_run_is_done_once_and_only_with_its_own_configuration(scaling: ModuleType, tmp_path: Path) -> None:
    overrides = [f"train.output_dir={tmp_path}", "data.train=/data", "data.seed=1"]
    run = scaling.Run("warmup-64", 1, tmp_path, overrides)
    assert not run.is_done()
    (tmp_path / "config.json").write_text(run.config.model_dump_json())
    assert not run.is_done()
    (tmp_path / "result.json").write_text('{"top1": 0.9}')
    assert run.is_done()
    assert not scaling.Run("warmup-64", 1, tmp_path, [*overrides, "train.epochs=5"]).is_done()


def test_the_mean_of_the_last_values(scaling: ModuleType) -> None:
    values = np.array([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 4.0, 0.0]])
    assert scaling.trailing_mean(values, 2) == pytest.approx(np.array([[1, 2, 4, 6], [0, 0, 2, 2]]))
    assert scaling.trailing_mean(values, 9)[0] == pytest.approx([1, 2, 3, 4])
