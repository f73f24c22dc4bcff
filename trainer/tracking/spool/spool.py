"""The spool: a JSON Lines file that keeps everything a run reports until MLflow has accepted it.

Every line names its run::

    {"run": KEY, "attempt": START_MS, "seq": N,
     "kind": "run" | "metrics" | "artifact" | "finish", ...}

The run key is chosen once per run and survives restarts; an attempt is one process of the run.
Lines may therefore be in any order, occur twice, and be mixed with lines of other runs. Lines
without ``run`` have the first format, in which an entry belonged to the nearest preceding run
entry.
"""

import fcntl
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_MAX_UNWRITTEN = 100_000
_RUN_KEY = re.compile(r"[0-9]{1,18}-[0-9A-Za-z_-]+")
_STATUSES = ("FINISHED", "FAILED", "KILLED")


def new_run_key() -> str:
    """Returns a unique key that begins with the run's start time in milliseconds."""
    return f"{now_ms():013d}-{uuid.uuid4().hex}"


def start_ms(run_key: str) -> int:
    """Returns the start time of the run ``run_key``, in milliseconds since the epoch."""
    return int(run_key.partition("-")[0])


def now_ms() -> int:
    return int(time.time() * 1000)


def record_path(spool: Path) -> Path:
    """Returns the path of the file that records which entries of ``spool`` MLflow has accepted."""
    return spool.with_suffix(".sent")


def rejected_path(spool: Path) -> Path:
    """Returns the path of the file that stores the entries of ``spool`` that MLflow rejected."""
    return spool if spool.name.endswith(".rejected.jsonl") else spool.with_suffix(".rejected.jsonl")


def first_format_record_path(spool: Path) -> Path:
    return spool.with_suffix(".sent.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the spool.

    ``digest`` identifies it: two lines with the same digest are one entry.
    """

    run_key: str
    attempt: int
    seq: int
    content: dict[str, Any]
    digest: str

    @property
    def kind(self) -> str:
        return str(self.content["kind"])


@dataclass(frozen=True, slots=True)
class CorruptLine:
    """A line that is not an entry.

    ``text`` escapes bytes that are not UTF-8; ``number`` counts from 1.
    """

    number: int
    text: str
    reason: str


class SpoolWriter:
    """Appends the entries of one attempt of a run. Thread-safe; never waits for a server.

    Holds a lock on the file while it is open. Raises UserError if another process holds the lock.
    """

    def __init__(self, path: Path, run_key: str, attempt: int, first_seq: int = 0) -> None:
        self.path = path
        self.run_key = run_key
        self.attempt = attempt
        self.error: OSError | None = None
        """The reason why entries are kept in memory, while the file cannot be written."""
        self.lost = 0
        """Number of entries that could neither be written nor kept in memory."""
        self._seq = first_seq
        self._unwritten: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._file = lock_spool(path, create=True)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a killed process left a partial line

    def append(self, kind: str, **content: Any) -> None:
        """Adds an entry. A full disk is not an error: the entry is written as soon as possible."""
        with self._lock:
            entry = {"run": self.run_key, "attempt": self.attempt, "seq": self._seq, "kind": kind}
            self._seq += 1
            self._unwritten.append(json.dumps(entry | content).encode() + b"\n")
            if len(self._unwritten) > _MAX_UNWRITTEN:
                self._unwritten.popleft()
                self.lost += 1
            try:
                while self._unwritten:
                    self._write(self._unwritten[0])
                    self._unwritten.popleft()
                self.error = None
            except OSError as error:
                self.error = error

    def _write(self, line: bytes) -> None:
        """Writes the complete line or nothing. Raises OSError."""
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
        except OSError:
            os.ftruncate(self._file, before)
            raise
        if written < len(line):
            os.ftruncate(self._file, before)
            raise OSError(28, "No space left on device")

    @property
    def unwritten(self) -> int:
        return len(self._unwritten)

    def close(self) -> None:
        """Closes the file, which releases the lock."""
        os.close(self._file)


def append_finish(spool: Path, status: str) -> None:
    """Ends the run of the last entry of ``spool``, whose process was killed before it could do so.

    Partial and corrupt lines are skipped. Raises UserError if the spool is in use.
    """
    last: dict[str, Any] = {}
    for line in spool.read_bytes().splitlines():
        with suppress(ValueError):  # a partial line
            last = parse_line(line)
    if "run" in last and last["kind"] != "finish":
        writer = SpoolWriter(spool, last["run"], last["attempt"], last["seq"] + 1)
        writer.append("finish", status=status, time_ms=now_ms())
        writer.close()


def lock_spool(path: Path, create: bool = False) -> int:
    """Returns an open, exclusively locked file descriptor of ``path``.

    Raises UserError if it is in use. On file systems without locks, the file is used unlocked.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        file = os.open(path, flags, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                os.close(file)
                raise UserError(
                    f"{path}: is in use by another process; a training in progress sends its "
                    "entries itself, so wait until it has ended"
                ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)  # the previous lock holder has delivered and removed the file


def parse_line(raw: bytes) -> dict[str, Any]:
    """Returns the content of a line. Raises ValueError with the reason if it is not an entry."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    if "run" in content:
        _require(content, "run", str)
        if not _RUN_KEY.fullmatch(content["run"]):
            raise ValueError(f"run: {content['run']!r} is not a run key")
        for name in ("attempt", "seq"):
            _require(content, name, int)
    kind = content.get("kind")
    if kind == "run":
        for name, types in _RUN_FIELDS.items():
            _require(content, name, types)
    elif kind == "metrics":
        for name, types in (("step", int), ("time_ms", int), ("values", dict)):
            _require(content, name, types)
    elif kind == "artifact":
        _require(content, "folder", str)
        if "path" not in content:
            _require(content, "name", str)
            _require(content, "text", str)
    elif kind == "finish":
        if content.get("status") not in _STATUSES:
            raise ValueError(f"status: {content.get('status')!r} is unknown")
    else:
        raise ValueError(f"kind: {kind!r} is unknown")
    return content


_RUN_FIELDS = {
    "experiment": str,
    "name": str,
    "time_ms": int,
    "params": dict,
    "tags": dict,
    "datasets": list,
}


def _require(content: Mapping[str, Any], name: str, kind: type) -> None:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not of type {kind.__name__}")


def line_digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def set_aside(spool: Path) -> Path:
    """Renames the spool of another run, together with its record; returns the new path."""
    number = int(time.time())
    while (target := spool.with_name(f"{number}-{spool.name}")).exists():
        number += 1
    for path in (record_path, first_format_record_path):
        if path(spool).exists():
            path(spool).rename(path(target))
    spool.rename(target)
    return target
