"""Where and how often progress is published, and that it never ends a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.errors import Diverged, Preempted, RetryableError, UserError
from trainer.locks.run_lock import LockLost, RunLock
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.progress.progress_record import (
    LINE_PREFIX,
    PROGRESS_FILE,
    PROGRESS_LOG_VARIABLE,
    ProgressRecord,
    read_progress,
)


def _publisher(folder: Path) -> ProgressPublisher:
    publisher = ProgressPublisher("a", 100)
    publisher.open_file(folder)
    publisher.update(phase="training", step=1)
    return publisher


def _read(folder: Path) -> ProgressRecord:
    record = read_progress(folder)
    assert record is not None
    return record


def test_the_file_is_published_at_most_once_per_second_unless_the_phase_changes(
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    publisher, step, written = _publisher(tmp_path), 1, set()
    while time.monotonic() - began < 1.5:
        step += 1
        publisher.update(step=step)
        written.add((tmp_path / PROGRESS_FILE).stat().st_mtime_ns)
    assert 2 <= len(written) <= 1 + time.monotonic() - began
    assert _read(tmp_path).step in range(2, step + 1)
    publisher.update(phase="evaluating", step=step + 1)
    assert (_read(tmp_path).phase, _read(tmp_path).step) == ("evaluating", step + 1)
    assert os.listdir(tmp_path) == [PROGRESS_FILE]


def test_the_log_has_records_only_if_the_environment_requests_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _publisher(tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(PROGRESS_LOG_VARIABLE, "1")
    publisher = ProgressPublisher("a")
    publisher.waiting("for\ndata")
    publisher.update(phase="training", message=None, loss=float("nan"))
    publisher.update(step=2)  # ten seconds have not passed
    ProgressPublisher("a", quiet=True).update(phase="training")
    lines = capsys.readouterr().out.splitlines()
    records = [ProgressRecord.from_json(line.removeprefix(LINE_PREFIX)) for line in lines]
    assert [(record.phase, record.message, record.loss) for record in records] == [
        ("waiting", "for data", None),
        ("training", None, None),
    ]


def test_a_file_that_cannot_be_written_is_reported_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PROGRESS_FILE).mkdir()
    publisher = _publisher(tmp_path)
    publisher.update(phase="evaluating")
    publisher.end(0)
    error = capsys.readouterr().err
    assert error.startswith(f"convoy: {tmp_path / PROGRESS_FILE} cannot be written: ")
    assert error.endswith("; training continues\n")
    assert len(error.splitlines()) == 1


def test_a_disk_without_space_leaves_the_last_record(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: both fail in the write."""
    code = f"""
import resource
from trainer.progress.progress_publisher import ProgressPublisher
from pathlib import Path
publisher = ProgressPublisher("a", 100)
publisher.open_file(Path({str(tmp_path)!r}))
publisher.update(phase="training", step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
publisher.update(phase="evaluating", step=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written: the file is larger than the limit") == 1
    assert _read(tmp_path).step == 1
    assert os.listdir(tmp_path) == [PROGRESS_FILE]


def test_nothing_is_written_where_another_process_owns_the_folder(tmp_path: Path) -> None:
    def lost() -> None:
        raise LockLost("taken over")

    publisher = ProgressPublisher("a")
    publisher.open_file(tmp_path, lost)
    publisher.update(phase="training")
    publisher.end(144, LockLost("taken over"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "error", "phase", "message"),
    [
        (0, None, "finished", None),
        (2, Diverged("the loss of step 3 is nan"), "diverged", "the loss of step 3 is nan"),
        (2, UserError("a: wrong", "b: wrong"), "failed", "a: wrong b: wrong"),
        (144, RetryableError("http://me:pw@store/: lost"), "failed", "http://store/: lost"),
        (1, KeyError("x"), "failed", "KeyError: 'x'"),
        (143, Preempted(), "preempted", None),
        (129, None, "preempted", None),
        (137, None, "failed", None),
    ],
)
def test_how_a_run_ended(
    code: int, error: BaseException | None, phase: str, message: str | None, tmp_path: Path
) -> None:
    publisher = _publisher(tmp_path)
    publisher.update(eta_seconds=5.0)
    publisher.end(code, error)
    record = _read(tmp_path)
    assert (record.phase, record.exit_code, record.message) == (phase, code, message)
    assert (record.step, record.eta_seconds) == (1, None)


def test_the_launcher_corrects_only_a_record_of_its_own_run(tmp_path: Path) -> None:
    began = time.time()
    launcher = ProgressPublisher("a")
    launcher.end_for_ranks(tmp_path, began, 144, None)
    assert os.listdir(tmp_path) == []
    rank = _publisher(tmp_path)
    before = (tmp_path / PROGRESS_FILE).read_bytes()
    launcher.end_for_ranks(tmp_path, time.time(), 2, None)  # refused before rank 0 began
    ProgressPublisher("a", quiet=True).end_for_ranks(tmp_path, began, 144, None)  # another pod
    with_lock = RunLock(str(tmp_path), "convoy train", "other", "wait")
    with_lock.acquire()
    try:
        launcher.end_for_ranks(tmp_path, began, 144, None)  # another run has the folder
    finally:
        with_lock.release()
    assert (tmp_path / PROGRESS_FILE).read_bytes() == before
    launcher.end_for_ranks(tmp_path, began, 144, None)
    assert (_read(tmp_path).phase, _read(tmp_path).exit_code) == ("failed", 144)
    assert _read(tmp_path).step == 1
    rank.end(2, Diverged("nan"))
    before = (tmp_path / PROGRESS_FILE).read_bytes()
    launcher.end_for_ranks(tmp_path, began, 2, None)
    assert (tmp_path / PROGRESS_FILE).read_bytes() == before
    assert json.loads(before)["phase"] == "diverged"
