"""Every study from measurements to verdicts, text and plot, with synthetic curves instead of
trainings.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.local.demo import find_fashion
from pipelines.studies.experiments import identity
from pipelines.studies.framework import measure
from pipelines.studies.framework.catalog import studies
from pipelines.studies.framework.command import run_study
from pipelines.studies.framework.runner import Run, Runs
from pipelines.studies.framework.study import Scale, Study, Training, overall
from trainer.export.exported_model import ModelMetadata, save_model

CLASSES = [str(number) for number in range(10)]


class SyntheticRuns(Runs):
    """Trainings with the initial weights and with losses that fall from ln 10.

    They differ only by seed and length.
    """

    def train(self, trainings: Any, what: str) -> None:
        self.requested = [training.label for training in trainings]

    def run_of(self, training: Training) -> Run:
        run = super().run_of(training)
        if not run.folder.exists():
            config = run.config()
            save_model(run.folder, measure.untrained(config), ModelMetadata.of(config, CLASSES, 10))
        return run

    def outcome(self, training: Training) -> dict[str, Any]:
        diverged = training.may_diverge and training.name.endswith("without-norm-1")
        return {
            "diverged": diverged,
            "seconds": 1.0,
            "peak_mib": 900.0 + training.seed,
            "mlflow_run_id": training.label,
            "top1": 0.8,
            "steps": self.run_of(training).steps(),
            "images_per_second": 500.0 * training.procs,
        }

    def history(self, training: Training, key: str) -> tuple[np.ndarray, np.ndarray]:
        steps = np.arange(1, self.run_of(training).steps() + 1)
        if key == "top1":
            epochs = self.run_of(training).config().train.epochs or 1
            steps = steps[:: max(1, len(steps) // epochs)][:epochs]
            return steps, np.linspace(0.5, 0.8 + training.seed / 100, len(steps))
        return steps, math.log(10) * np.exp(-steps / 50) + 0.3 + training.seed / 100


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRuns:
    if find_fashion() is None:
        pytest.skip("Fashion-MNIST is unavailable")
    return SyntheticRuns(tmp_path_factory.mktemp("study"), jobs=2)


@pytest.mark.parametrize("study", studies(), ids=lambda study: study.name)
def test_study_writes_verdicts_text_and_plot(
    study: Study,
    synthetic: SyntheticRuns,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_steps = identity.fit  # 3 steps instead of 60: the result does not matter here
    monkeypatch.setattr(
        identity, "fit", lambda *args: few_steps(*args[:3], 3, args[4]) + [0.1] * (args[3] - 3)
    )
    scale = Scale(
        quick=True, seeds=1 if study.name == "identity" else 2
    )  # the identity study trains its blocks itself
    returned = run_study(study, scale, synthetic)
    assert synthetic.requested == [training.label for training in study.trainings(scale)]
    folder: Path = synthetic.folder / study.name
    result = json.loads((folder / "result.json").read_text())
    assert result == json.loads(json.dumps(returned))
    claims = study.judge(result["figures"])  # the file suffices to judge again
    assert [vars(claim) for claim in claims] == result["claims"]
    assert {claim.statement for claim in claims} == set(study.statements)
    assert result["verdict"] == overall(claims)
    assert study.paragraph(result["figures"]) == result["paragraph"]
    page = (folder / "paragraph.md").read_text()
    assert study.rule in page
    assert "nan" not in result["paragraph"]
    assert (folder / "plot.png").stat().st_size > 10_000
    assert all(
        f"{study.name}: {claim.statement}: {claim.verdict}" in capsys.readouterr().out
        for claim in claims[:1]
    )
