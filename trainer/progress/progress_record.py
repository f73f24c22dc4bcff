"""ProgressRecord: what a run is doing, for programs.

The trainer publishes it as ``progress.json`` in its output folder and, in pods, as lines of the
log. Nothing else of the log is meant for programs.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trainer.secrets.redaction import redact

PROGRESS_FILE = "progress.json"
LINE_PREFIX = "convoy-progress: "
"""Start of a log line that holds a record."""
PROGRESS_LOG_VARIABLE = "CONVOY_PROGRESS_LOG"
"""Environment variable that enables records in the log if it is 1; set by the job's manifest."""
LONGEST_SECONDS = 1e10
_LONGEST_TEXT = 1000
_LONGEST_LINE = 16 * 1024

Phase = Literal[
    "waiting",
    "rendezvous",
    "starting",
    "training",
    "evaluating",
    "finished",
    "preempted",
    "diverged",
    "failed",
]


class CorruptRecord(ValueError):
    """Raised for text that is not a progress record of this version."""


def _clean(text: str) -> str:
    """Return ``text`` on one line, without credentials and control characters."""
    text = redact(text)[:_LONGEST_TEXT]
    return "".join(character if character.isprintable() else " " for character in text)


_Text = Annotated[str, AfterValidator(_clean)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_NonNegative = Annotated[float, Field(ge=0)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True),
)
class ProgressRecord:
    """Progress of a run. A value that is not known is None.

    A later version of Convoy may add fields; readers ignore fields that they do not know. Texts
    contain no credentials and no control characters.
    """

    version: Literal[1] = 1
    """Version of the schema."""
    run_name: _Text
    """`name` of the recipe."""
    phase: Phase
    """What the run does (`waiting`: for data, a lock or another pod; `rendezvous`, `starting`,
    `training`, `evaluating`) or how it ended (`finished`, `preempted`, `diverged`, `failed`)."""
    updated_at: _NonNegative
    """Unix time of the record, seconds."""
    step: _Count | None = None
    """Optimizer steps done, including those before a resume."""
    total_steps: _Count | None = None
    """Optimizer step at which the run ends."""
    epoch: _NonNegative | None = None
    """Epochs done, with a fraction."""
    loss: float | None = None
    """Training loss of the last logged step, averaged over ranks; null if it is NaN or Inf."""
    images_per_second: _NonNegative | None = None
    """Training images per second of all ranks since the step that was logged before."""
    eta_seconds: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] | None = None
    """Estimated seconds to the last step, including evaluation."""
    mlflow_run_id: _Text | None = None
    """ID of the MLflow run."""
    mlflow_tracking_uri: _Text | None = None
    """Address of the MLflow server."""
    checkpoint_step: _Count | None = None
    """Step of the newest checkpoint that is completely written."""
    checkpoint_url: _Text | None = None
    """URL of that checkpoint."""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """Exit code of the run; null while it runs."""
    message: _Text | None = None
    """What the run waits for, or the error that ended it."""

    def to_json(self) -> str:
        """Return the record as one line of ASCII."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ProgressRecord":
        """Parse a record. Raises CorruptRecord."""
        if len(text) > _LONGEST_LINE:
            raise CorruptRecord(f"{len(text):,} characters are too many for a progress record")
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, fault["loc"]))
            raise CorruptRecord(f"{where}: {fault['msg']}" if where else fault["msg"]) from None


def read_progress(folder: Path) -> ProgressRecord | None:
    """Return the record in an output folder; None if it is missing or corrupt."""
    try:
        return ProgressRecord.from_json((folder / PROGRESS_FILE).read_bytes())
    except (OSError, CorruptRecord):
        return None


def last_record(lines: Iterable[str]) -> ProgressRecord | None:
    """Return the last valid record in the lines of a log, or None if there is none."""
    for line in reversed(list(lines)):
        if is_record(line):
            try:
                return ProgressRecord.from_json(line.removeprefix(LINE_PREFIX))
            except CorruptRecord:
                continue
    return None


def is_record(line: str) -> bool:
    """Return whether a line of the log is a progress record, valid or not."""
    return line.startswith(LINE_PREFIX)
