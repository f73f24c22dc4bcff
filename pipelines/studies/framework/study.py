"""Defines a study.

A study has a question, a rule that was written before the results, and the trainings and
measurements that answer it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from pipelines.studies.framework.runner import Runs

Verdict = Literal["borne out", "not borne out", "undecided"]
BORNE_OUT: Verdict = "borne out"
NOT_BORNE_OUT: Verdict = "not borne out"
UNDECIDED: Verdict = "undecided"

LEAST_SEEDS = 3
"""Minimum number of seeds. With fewer, a comparison of trained networks is undecided whatever it
shows: two equal networks differ too.
"""

T = TypeVar("T")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Size of a study.

    ``seeds``: trainings of each kind that differ only in initial weights and sample order.
    """

    quick: bool
    seeds: int

    def choose(self, quick: T, full: T) -> T:
        return quick if self.quick else full

    @property
    def train_samples(self) -> int:
        """Number of Fashion-MNIST's 60,000 training images to use; the first ones are used."""
        return self.choose(4096, 12_000)

    @property
    def val_samples(self) -> int:
        """Number of its 10,000 test images to use; the first ones are used."""
        return self.choose(2000, 5000)


@dataclass(frozen=True)
class Training:
    """One run of the trainer on the first images of Fashion-MNIST: a recipe with a study's keys."""

    name: str
    """Unique among all studies; studies that request the same training share it."""
    seed: int
    """Seed of initial weights and sample order."""
    train_samples: int
    val_samples: int
    keys: tuple[str, ...] = ()
    """Overrides as ``key=value``, as on the command line."""
    measured_on: Literal["train", "val"] = "val"
    """The split on which top-1 is measured after each epoch."""
    recipe: str = "study"
    procs: int = 1
    may_diverge: bool = False
    """Whether a loss that is NaN or Inf is a result rather than a failure."""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class Claim:
    """A part of a study's answer: the claim that was tested, and its verdict."""

    statement: str
    """Id of the statement in docs/statements.md."""
    text: str
    verdict: Verdict
    why: str
    """The figures that decided the verdict."""


@dataclass(frozen=True)
class Study:
    """An experiment.

    All of its measurements go into ``figures``, so that verdicts, plot and text depend only on
    them.
    """

    name: str
    statements: tuple[str, ...]
    """Ids of the statements in docs/statements.md that it tests."""
    question: str
    rule: str
    """The rule for each verdict, in words; ``judge`` implements it."""
    measure: Callable[["Runs", Scale], Figures]
    judge: Callable[[Figures], list[Claim]]
    plot: Callable[[Figures, Path], None]
    paragraph: Callable[[Figures], str]
    trainings: Callable[[Scale], list[Training]] = field(default=lambda scale: [])
    seeded: bool = True
    """Whether it uses random numbers."""


def mean_std(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return mean, standard deviation (None for one value) and each value, in seed order."""
    return {
        "mean": round(statistics.mean(values), digits),
        "deviation": round(statistics.stdev(values), digits) if len(values) > 1 else None,
        "each": [round(value, digits) for value in values],
    }


def format_mean_std(values: dict[str, Any], digits: int = 1, unit: str = "") -> str:
    """Format a spread as text: ``91.2 ± 0.3%``."""
    deviation = "" if values["deviation"] is None else f" ± {values['deviation']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}{unit}"


def verdict_by_seeds(differences: Sequence[float], least: float = 0.0) -> Verdict:
    """Return the verdict on differences by seed.

    It is borne out if every seed's difference is above ``least``, not borne out if every one is at
    most ``least``, else undecided. It is also undecided with fewer than LEAST_SEEDS: of two equal
    networks, one leads in each of three seeds one time in eight.
    """
    if len(differences) < LEAST_SEEDS:
        return UNDECIDED
    if min(differences) > least:
        return BORNE_OUT
    return NOT_BORNE_OUT if max(differences) <= least else UNDECIDED


SAME, LEAST_FALL = 0.01, 0.3
"""Nats. SAME: losses of one step that differ by less are the same (sums in another order round
differently, and training amplifies that). LEAST_FALL: a curve must fall by this much, since curves
of networks that learn nothing are alike in any case.
"""


def same_curves(statement: str, text: str, max_diff: float, fall: float) -> Claim:
    """Return the claim that loss curves are the same.

    ``max_diff``: largest difference between losses of one step; ``fall``: decrease of the loss in
    the run in which it decreased least.
    """
    verdict = UNDECIDED if fall < LEAST_FALL else verdict_if(max_diff < SAME)
    return Claim(
        statement,
        text,
        verdict,
        f"at most {max_diff:.2g} nats apart, while the loss fell by at least {fall:.2f}",
    )


def fall_of(losses: Sequence[float]) -> float:
    """Return the decrease from the first loss to the mean of the last fifth."""
    last = losses[-max(1, len(losses) // 5) :]
    return float(losses[0]) - float(sum(last)) / len(last)


def verdict_if(holds: bool) -> Verdict:
    """Return the verdict on a computed value, which has no spread."""
    return BORNE_OUT if holds else NOT_BORNE_OUT


def differences_text(differences: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Format the differences seed by seed, with a note if they are too few to decide."""
    each = ", ".join(f"{value:+.{digits}f}{unit}" for value in differences)
    few = (
        f"; fewer than {LEAST_SEEDS} seeds decide nothing" if len(differences) < LEAST_SEEDS else ""
    )
    return f"seed by seed {each}{few}"


def overall(claims: Sequence[Claim]) -> Verdict:
    """Return the verdict of a study: not borne out if any claim is, else undecided if any is."""
    verdicts = {claim.verdict for claim in claims}
    for verdict in (NOT_BORNE_OUT, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return BORNE_OUT
