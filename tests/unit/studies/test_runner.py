"""Trainings of studies: when they are done, what is read from them, and error messages.

`make test-studies` runs real trainings.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import RunText

from pipelines.local.demo import _INSTALLED
from pipelines.studies.experiments.data import first_of_idx
from pipelines.studies.framework.progress import StudyProgress
from pipelines.studies.framework.runner import Run, _keep, check_disk_space
from pipelines.studies.framework.study import Training
from trainer.errors import UserError
from trainer.progress.progress_record import PROGRESS_FILE, ProgressRecord


def test_training_is_done_only_with_the_same_configuration(tmp_path: Path) -> None:
    def run(*keys: str) -> Run:
        return Run(
            Training("a", 0, 64, 64), tmp_path, ["name=a", f"train.output_dir={tmp_path}", *keys]
        )

    assert not run().is_begun()
    (tmp_path / "config.json").write_text(
        run("tracking.uri=http://elsewhere").config().model_dump_json()
    )
    assert run().is_begun()  # tracking does not matter
    assert not run().is_done()
    (tmp_path / "outcome.json").write_text("{}")
    assert run().is_done()
    assert not run("train.epochs=9").is_begun()
    assert not run("train.epochs=9").is_done()


def test_names_with_decimal_points_have_separate_logs(tmp_path: Path) -> None:
    logs = {
        Run(Training("a", 0, 64, 64), tmp_path / f"rate-{rate}", []).log for rate in ("0.1", "0.02")
    }
    assert len(logs) == 2


def test_the_step_comes_from_the_progress_file_and_only_errors_show_the_log(
    tmp_path: Path,
) -> None:
    run = Run(Training("a", 0, 64, 64), tmp_path / "a", [])
    run.log.write_text("step 20/96 epoch 0.3\nstep 40/96 epoch 0.6 loss 1\n")
    assert run.step() == 0
    _publish(run, "training", step=41)
    assert run.step() == 41
    assert run.log_tail().startswith("step 40/96")


def _publish(run: Run, phase: str, **values: int | str) -> None:
    run.folder.mkdir(exist_ok=True)
    record = ProgressRecord(run_name="a", phase=phase, updated_at=1.0, **values)  # type: ignore[arg-type]
    (run.folder / PROGRESS_FILE).write_text(record.to_json())


def _ended(code: int) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    return process


def test_a_training_diverged_if_its_progress_file_says_so(tmp_path: Path) -> None:
    run = Run(Training("a", 0, 64, 64, may_diverge=True), tmp_path / "a", [])
    run.log.write_text("convoy: the loss of step 9 is nan: training diverged; lower ...\n")
    _publish(run, "failed", exit_code=2)
    with pytest.raises(UserError, match="ended with exit code 2: convoy: the loss of step 9"):
        _keep(run, _ended(2), 1.0, 1.0)
    _publish(run, "diverged", step=9, mlflow_run_id="12ab", exit_code=2)
    _keep(run, _ended(2), 1.0, 1.0)
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["diverged"], outcome["steps"], outcome["mlflow_run_id"]) == (True, 9, "12ab")
    strict = Run(Training("a", 0, 64, 64), tmp_path / "a", [])
    with pytest.raises(UserError, match="ended with exit code 2"):
        _keep(strict, _ended(2), 1.0, 1.0)


def test_first_of_idx_truncates_images_and_labels() -> None:
    content = bytes([0, 0, 8, 3]) + struct.pack(">3i", 3, 2, 2) + bytes(range(12))
    assert first_of_idx(content, 2) == bytes([0, 0, 8, 3]) + struct.pack(">3i", 2, 2, 2) + bytes(
        range(8)
    )
    labels = bytes([0, 0, 8, 1]) + struct.pack(">i", 3) + bytes([7, 8, 9])
    assert first_of_idx(labels, 1) == bytes([0, 0, 8, 1]) + struct.pack(">i", 1) + bytes([7])
    with pytest.raises(UserError, match="has 3 images in this split, not 4"):
        first_of_idx(content, 4)


def test_progress_is_weighted_by_cost() -> None:
    progress = StudyProgress("x", [("cheap", 1.0), ("expensive", 3.0)], 2)
    assert progress.left() == "time left unknown"
    progress.at("expensive", 0.5)
    assert progress.part() == pytest.approx(1.5 / 4)
    progress.ended("cheap", "")
    assert progress.part() == pytest.approx(2.5 / 4)


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    check_disk_space(tmp_path, 1)
    with pytest.raises(UserError, match="MiB free, but studies need 1,099,511,627,776 MiB"):
        check_disk_space(tmp_path, 2**60)


def test_unknown_study_and_unusable_folder_are_errors(
    convoy_refuses: RunText, tmp_path: Path
) -> None:
    assert "no study 'accumulatoin'; nearest: accumulation" in convoy_refuses(
        "study", "accumulatoin"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in convoy_refuses("study", "then-and-now", "--dir", file)


@pytest.mark.skipif(_INSTALLED.is_dir(), reason="the data is installed on this machine")
def test_missing_dataset_error_names_the_package(convoy_refuses: RunText, tmp_path: Path) -> None:
    without_apt = {"PATH": str(tmp_path), "CONVOY_CACHE": str(tmp_path / "cache")}
    assert "dataset-fashion-mnist" in convoy_refuses(
        "study", "accumulation", "--quick", "--dir", tmp_path / "s", env=without_apt
    )


def _result(folder: Path, name: str) -> dict[str, object]:
    assert (folder / name / "plot.png").stat().st_size > 10_000
    assert (folder / name / "paragraph.md").read_text().startswith(f"## {name}")
    result: dict[str, object] = json.loads((folder / name / "result.json").read_text())
    return result


def test_study_without_trainings_writes_its_result(convoy_ok: RunText, tmp_path: Path) -> None:
    printed = convoy_ok("study", "then-and-now", "--dir", tmp_path)
    assert "not borne out" in printed
    result = _result(tmp_path, "then-and-now")
    assert (result["statements"], result["verdict"]) == (["S1"], "not borne out")
    assert result["training_seconds"] == 0
