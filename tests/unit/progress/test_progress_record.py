"""Progress records: what survives a round trip, what is rejected, and what never passes through."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.progress.progress_record import (
    LINE_PREFIX,
    PROGRESS_FILE,
    CorruptRecord,
    ProgressRecord,
    last_record,
    read_progress,
)

VALUES: dict[str, Any] = {
    "version": 1,
    "run_name": "r50",
    "phase": "training",
    "updated_at": 1.8e9,
    "step": 400,
    "total_steps": 1000,
    "epoch": 0.08,
    "loss": 5.1,
    "images_per_second": 2345.5,
    "eta_seconds": 123.0,
    "mlflow_run_id": "0a1b",
    "mlflow_tracking_uri": "http://convoy-mlflow:5000",
    "checkpoint_step": 380,
    "checkpoint_url": "s3://convoy/checkpoints/r50/step-000000380",
    "exit_code": None,
    "message": None,
}
RECORD = ProgressRecord(**VALUES)


def test_a_record_survives_a_round_trip_on_one_line() -> None:
    text = RECORD.to_json()
    assert json.loads(text) == VALUES
    assert ProgressRecord.from_json(text) == RECORD
    assert ProgressRecord.from_json(text.encode()) == RECORD


def test_unknown_fields_are_ignored_and_missing_values_are_none() -> None:
    assert ProgressRecord.from_json(json.dumps(VALUES | {"fans": {"rpm": [1]}})) == RECORD
    few = {key: VALUES[key] for key in ("run_name", "phase", "updated_at")}
    assert ProgressRecord.from_json(json.dumps(few)) == ProgressRecord(**few)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "{" * 100_000, "x" * 100_000, RECORD.to_json()[:-1], b"\xff\xfe",
        *(
            json.dumps(VALUES | change)
            for change in (
                {"version": 2}, {"phase": "dancing"}, {"step": -1}, {"step": 1.5}, {"step": "400"},
                {"step": True},
                {"step": 10**30}, {"loss": math.nan}, {"images_per_second": math.inf},
                {"eta_seconds": 1e300},
                {"run_name": None}, {"updated_at": "now"}, {"exit_code": 256},
            )
        ),
    ],
    ids=lambda text: str(text)[:20],
)  # fmt: skip
def test_corrupt_records_are_rejected(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptRecord):
        ProgressRecord.from_json(text)
    (tmp_path / PROGRESS_FILE).write_bytes(text.encode() if isinstance(text, str) else text)
    assert read_progress(tmp_path) is None


@given(st.text())
def test_any_text_is_a_record_or_corrupt(text: str) -> None:
    with pytest.raises(CorruptRecord):
        ProgressRecord.from_json(text)


@given(st.text(max_size=50))
def test_texts_contain_no_control_characters(text: str) -> None:
    for record in (
        ProgressRecord(**VALUES | {"message": text}),
        ProgressRecord.from_json(json.dumps(VALUES | {"message": text.replace("\ud800", "")})),
    ):
        assert record.message is not None
        assert record.message.isprintable()
        assert record.to_json().isascii()
        assert record.to_json().isprintable()


def test_texts_contain_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Correct/Horse7")
    values = VALUES | {
        "mlflow_tracking_uri": "http://me:hunter2@mlflow:5000",
        "checkpoint_url": "https://store/x?X-Amz-Signature=abcdef",
        "message": "refused: Correct/Horse7\x1b[31m",
    }
    for record in (ProgressRecord(**values), ProgressRecord.from_json(json.dumps(values))):
        assert record.mlflow_tracking_uri == "http://mlflow:5000"
        assert record.checkpoint_url == "https://store/x?X-Amz-Signature=***"
        assert record.message == "refused: *** [31m"


def test_the_last_valid_record_of_a_log_is_found() -> None:
    first = LINE_PREFIX + json.dumps(VALUES | {"step": 20})
    last = LINE_PREFIX + RECORD.to_json()
    assert last_record([]) is None
    assert last_record(["step 20/1000", RECORD.to_json(), f"x {last}"]) is None
    assert last_record([first, last, "step 400/1000", last[:100]]) == RECORD


def test_a_missing_file_is_no_record(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS_FILE).write_text(RECORD.to_json() + "\n")
    assert read_progress(tmp_path) == RECORD
