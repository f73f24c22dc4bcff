"""What a study is: a question, a rule that was written before the results, the trainings and
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
"""Below that many, a comparison of trained networks is undecided, whatever it shows: two equals
differ too.
"""

T = TypeVar("T")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is spent. ``seeds``: trainings of each kind that differ in initial weights and
    sample order alone.
    """

    quick: bool
    seeds: int

    def choose(self, quick: T, full: T) -> T:
        return quick if self.quick else full

    @property
    def train_samples(self) -> int:
        """Of Fashion-MNIST's 60,000 training images, the first."""
        return self.choose(4096, 12_000)

    @property
    def val_samples(self) -> int:
        """Of its 10,000 test images, the first."""
        return self.choose(2000, 5000)


@dataclass(frozen=True)
class Training:
    """One run of the trainer on the first images of Fashion-MNIST: a recipe with the keys of a
    study.
    """

    name: str
    """Unique among all studies; studies that ask for the same training share it."""
    seed: int
    """Of initial weights and sample order."""
    train_samples: int
    val_samples: int
    keys: tuple[str, ...] = ()
    """``key=value``, as on the command line."""
    measured_on: Literal["train", "val"] = "val"
    """The split whose top1 is measured after each epoch."""
    recipe: str = "study"
    procs: int = 1
    may_diverge: bool = False
    """Whether a loss that is no number is an answer, not a failure."""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class Claim:
    """A part of a study's answer: what of which statement was tried, and how it came out."""

    statement: str
    """Id in the cheatsheet."""
    text: str
    verdict: Verdict
    why: str
    """The figures that decided."""


@dataclass(frozen=True)
class Study:
    """An experiment. What it measures goes into ``figures`` whole, so that verdicts, plot and text
    follow from them alone.
    """

    name: str
    statements: tuple[str, ...]
    """Ids in the cheatsheet that it bears on."""
    question: str
    rule: str
    """When which verdict is given, in words; ``judge`` is the same in code."""
    measure: Callable[["Runs", Scale], Figures]
    judge: Callable[[Figures], list[Claim]]
    plot: Callable[[Figures, Path], None]
    paragraph: Callable[[Figures], str]
    trainings: Callable[[Scale], list[Training]] = field(default=lambda scale: [])
    seeded: bool = True
    """Whether anything in it is drawn."""


def mean_std(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Mean, standard deviation (None of one) and each value, in the order of the seeds."""
    return {
        "mean": round(statistics.mean(values), digits),
        "deviation": round(statistics.stdev(values), digits) if len(values) > 1 else None,
        "each": [round(value, digits) for value in values],
    }


def format_mean_std(values: dict[str, Any], digits: int = 1, unit: str = "") -> str:
    """A spread as text: ``91.2 ± 0.3%``."""
    deviation = "" if values["deviation"] is None else f" ± {values['deviation']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}{unit}"


def verdict_by_seeds(differences: Sequence[float], least: float = 0.0) -> Verdict:
    """Borne out where every seed's difference is above ``least``, not where every one is at most
    that, else undecided.

    Undecided with fewer than LEAST_SEEDS too: of two equals one leads in each of three seeds one
    time in eight.
    """
    if len(differences) < LEAST_SEEDS:
        return UNDECIDED
    if min(differences) > least:
        return BORNE_OUT
    return NOT_BORNE_OUT if max(differences) <= least else UNDECIDED


SAME, LEAST_FALL = 0.01, 0.3
"""Nats: below the first, losses of one step are the same (sums in another order round differently,
and training amplifies that); by the second a curve must fall, since curves of networks that learn
nothing are alike whatever is done.
"""


def same_curves(statement: str, text: str, apart: float, fall: float) -> Claim:
    """``apart``: greatest difference of one step's losses; ``fall``: by how much the loss fell in
    the run where it fell least.
    """
    verdict = UNDECIDED if fall < LEAST_FALL else verdict_if(apart < SAME)
    return Claim(
        statement,
        text,
        verdict,
        f"{apart:.2g} nats apart at most, while the loss fell by at least {fall:.2f}",
    )


def fall_of(losses: Sequence[float]) -> float:
    """From the first loss to the mean of the last fifth."""
    last = losses[-max(1, len(losses) // 5) :]
    return float(losses[0]) - float(sum(last)) / len(last)


def verdict_if(holds: bool) -> Verdict:
    """Of what is computed, and so has no spread."""
    return BORNE_OUT if holds else NOT_BORNE_OUT


def differences_text(differences: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Seed by seed, and why these do not decide where they are too few."""
    each = ", ".join(f"{value:+.{digits}f}{unit}" for value in differences)
    few = (
        f"; fewer than {LEAST_SEEDS} seeds decide nothing" if len(differences) < LEAST_SEEDS else ""
    )
    return f"seed by seed {each}{few}"


def overall(claims: Sequence[Claim]) -> Verdict:
    """One claim that is not borne out is told first, then one that is undecided."""
    verdicts = {claim.verdict for claim in claims}
    for verdict in (NOT_BORNE_OUT, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return BORNE_OUT
