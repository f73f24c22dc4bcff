"""The recipes of the studies warmup and linear-scaling: their learning rates and differences."""

import numpy as np
import pytest

from pipelines.studies.experiments import linear_scaling, warmup
from pipelines.studies.framework.study import BORNE_OUT, NOT_BORNE_OUT, UNDECIDED, mean_std
from trainer.config.load import RECIPES
from trainer.config.schema import RunConfig, load_config
from trainer.training.lr_schedule import learning_rate_schedule

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


def _rates(config: RunConfig) -> list[float]:
    """Return the learning rate of every step on Fashion-MNIST, without the partial last batch."""
    per_epoch = IMAGES // config.batch.global_size
    rate = learning_rate_schedule(
        config.schedule, config.optimizer, config.batch.global_size, per_epoch, EPOCHS * per_epoch
    )
    return [rate(step) for step in range(EPOCHS * per_epoch)]


@pytest.mark.parametrize("recipe", EXPECTED)
def test_learning_rates_of_each_recipe(recipe: str) -> None:
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


def test_recipes_differ_only_in_batch_rate_and_warmup() -> None:
    """Batch norm has the same micro-batch in all, so the loss is the same function (Goyal et al.
    2017, 2.3).
    """
    free = {
        "name",
        "batch.global_size",
        "optimizer.base_lr",
        "optimizer.base_batch",
        "schedule.warmup_epochs",
        "schedule.warmup_lr",
    }
    rest = [
        {key: value for key, value in load_config(recipe).flat().items() if key not in free}
        for recipe in EXPECTED
    ]
    assert all(other == rest[0] for other in rest)
    assert rest[0]["batch.micro_size"] == 64


def test_studies_use_all_warmup_recipes() -> None:
    assert (
        sorted(linear_scaling.RECIPES)
        == sorted(EXPECTED)
        == sorted(path.stem for path in RECIPES.glob("warmup-*.yaml"))
    )
    assert set(warmup.RECIPES) <= set(linear_scaling.RECIPES)


def _figures(**top1: list[float]) -> dict[str, dict[str, object]]:
    return {
        name.replace("_", "-"): {"top1_percent": mean_std(values)} for name, values in top1.items()
    }


def test_claims_are_judged_seed_by_seed() -> None:
    figures = _figures(
        warmup_64=[91.0, 91.2, 91.1],
        warmup_512=[91.1, 91.1, 91.2],  # twice above, once below
        warmup_512_unscaled=[89.0, 89.0, 89.0],
        warmup_64_fast=[91.0, 91.0, 91.0],
        warmup_512_fast=[90.0, 90.5, 90.9],  # always below
        warmup_512_cold=[90.5, 89.0, 91.0],
    )
    claims = linear_scaling.judge(figures)
    assert [claim.verdict for claim in claims] == [BORNE_OUT, BORNE_OUT, NOT_BORNE_OUT]
    assert "+2.10 points, +2.10 points, +2.20 points" in claims[1].why
    (cold,) = warmup.judge(figures)
    assert cold.verdict == UNDECIDED
    two = _figures(
        **{
            name.replace("-", "_"): entry["top1_percent"]["each"][:2]
            for name, entry in figures.items()
        }
    )  # type: ignore[index]
    assert {claim.verdict for claim in linear_scaling.judge(two)} == {UNDECIDED}
