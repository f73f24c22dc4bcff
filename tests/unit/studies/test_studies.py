"""All studies: their statements, texts and trainings; and how verdicts are derived."""

import pytest

from pipelines.studies.framework.catalog import NAMES, load, studies
from pipelines.studies.framework.study import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    UNDECIDED,
    Claim,
    Scale,
    Study,
    fall_of,
    mean_std,
    overall,
    same_curves,
    verdict_by_seeds,
)
from trainer.config.schema import load_config
from trainer.errors import UserError

IDS = {
    *("I1", "I2", "I3", "I4", "I5", "I6", "I7"),
    *("R1", "R2", "R3"),
    *("T1", "T2", "T3", "T4", "T5", "T6", "S1"),
    *("P1", "P2", "P3", "P4", "P5"),
}
"""Every statement in docs/statements.md."""
ALL = studies()
SCALES = [Scale(quick=True, seeds=1), Scale(quick=False, seeds=3)]


def test_every_statement_has_a_study() -> None:
    assert {statement for study in ALL for statement in study.statements} == IDS


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_study_has_a_question_and_a_rule(study: Study) -> None:
    assert study.question.endswith("?")
    assert "borne out" in study.rule.lower()
    assert len(study.rule) > 60


@pytest.mark.parametrize("scale", SCALES, ids=["quick", "full"])
@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_trainings_have_valid_recipes(study: Study, scale: Scale) -> None:
    trainings = study.trainings(scale)
    labels = [training.label for training in trainings]
    assert len(set(labels)) == len(labels)
    assert {training.seed for training in trainings} >= set(range(scale.seeds)) or not trainings
    for training in trainings:
        config = load_config(training.recipe, list(training.keys))
        assert config.train.epochs or config.train.max_steps
        assert training.train_samples <= 60_000
        assert training.val_samples <= 10_000


def test_trainings_with_the_same_label_are_equal_in_all_studies() -> None:
    """Studies share trainings; different ones with the same label would overwrite each other."""
    for scale in SCALES:
        known = {}
        for training in (t for study in ALL for t in study.trainings(scale)):
            assert known.setdefault(training.label, training) == training


@pytest.mark.parametrize(
    ("differences", "least", "verdict"),
    [
        ([1.0, 2.0, 0.1], 0.0, BORNE_OUT),
        ([-1.0, -2.0, 0.0], 0.0, NOT_BORNE_OUT),
        ([1.0, -2.0, 1.0], 0.0, UNDECIDED),
        ([5.0, 5.0], 0.0, UNDECIDED),  # two seeds are too few
        ([-5.0], 0.0, UNDECIDED),
        ([2.1, 2.2, 3.0], 2.0, BORNE_OUT),
        ([1.0, 1.9, 2.0], 2.0, NOT_BORNE_OUT),
        ([-0.4, 0.3, -0.1], -0.5, BORNE_OUT),
    ],
)
def test_verdict_by_seeds(differences: list[float], least: float, verdict: str) -> None:
    assert verdict_by_seeds(differences, least) == verdict


def test_overall_verdict_is_that_of_the_worst_claim() -> None:
    def claims(*verdicts: str) -> list[Claim]:
        return [Claim("I1", "", verdict, "") for verdict in verdicts]  # type: ignore[arg-type]

    assert overall(claims(BORNE_OUT, BORNE_OUT)) == BORNE_OUT
    assert overall(claims(BORNE_OUT, UNDECIDED)) == UNDECIDED
    assert overall(claims(UNDECIDED, NOT_BORNE_OUT, BORNE_OUT)) == NOT_BORNE_OUT


def test_verdict_on_curves_that_do_not_fall_is_undecided() -> None:
    assert same_curves("T4", "", max_diff=0.0, fall=0.01).verdict == UNDECIDED
    assert same_curves("T4", "", max_diff=0.001, fall=1.0).verdict == BORNE_OUT
    assert same_curves("T4", "", max_diff=0.02, fall=1.0).verdict == NOT_BORNE_OUT
    assert fall_of([2.3, 1.0, 1.0, 1.0, 1.5]) == pytest.approx(0.8)


def test_mean_std_of_one_value_has_no_deviation() -> None:
    assert mean_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "deviation": 1.0, "each": [1.0, 2.0, 3.0]}
    assert mean_std([1.5])["deviation"] is None


def test_unknown_study_error_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no study 'drop-out'; nearest: dropout"):
        load("drop-out")
    assert len(set(NAMES)) == len(NAMES)
