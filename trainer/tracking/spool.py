"""The spool: a JSON Lines file that keeps everything a run reports until MLflow has accepted it.

Every line names its run::

    {"run": KEY, "attempt": START_MS, "seq": N, "kind": "run" | "metrics" | "artifact" | "finish", ...}

The run key is chosen once per run and survives restarts; an attempt is one process of the run. The
lines may therefore stand in any order, twice, and together with those of other runs. Lines without
``run`` are of the first format, in which an entry belonged to the nearest run entry before it.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_MAX_UNWRITTEN = 100_000
_STATUSES = ("FINISHED", "FAILED", "KILLED")


def new_run_key() -> str:
    """A unique key that begins with the run's start time in milliseconds."""
    return f"{now_ms():013d}-{uuid.uuid4().hex}"


def start_ms(run_key: str) -> int:
    """The start time of the run that ``run_key`` names, in milliseconds since the epoch."""
    return int(run_key.partition("-")[0])


def now_ms() -> int:
    return int(time.time() * 1000)


def record_path(spool: Path) -> Path:
    """The file that records which entries of ``spool`` MLflow has accepted."""
    return spool.with_suffix(".sent")


def rejected_path(spool: Path) -> Path:
    """The file that keeps the entries of ``spool`` that MLflow rejected."""
    return spool if spool.name.endswith(".rejected.jsonl") else spool.with_suffix(".rejected.jsonl")


def first_format_record_path(spool: Path) -> Path:
    return spool.with_suffix(".sent.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. ``digest`` identifies it: two lines with the same digest are one entry."""

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
    """A line that is not an entry. ``text`` escapes what is not UTF-8; ``number`` counts from 1."""

    number: int
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry is in the file; the order of places is the order of delivery."""

    attempt: int
    seq: int
    offset: int
    length: int

    @property
    def order(self) -> tuple[int, int, int]:
        return self.attempt, self.seq, self.offset


class SpoolWriter:
    """Appends the entries of one attempt of a run. Thread-safe; never waits for a server.

    Holds a lock on the file while it is open. Raises UserError if another process holds it.
    """

    def __init__(self, path: Path, run_key: str, attempt: int) -> None:
        self.path = path
        self.run_key = run_key
        self.attempt = attempt
        self.error: OSError | None = None
        """The reason why entries are kept in memory, while the file cannot be written."""
        self.lost = 0
        """Entries that could neither be written nor kept in memory."""
        self._seq = 0
        self._unwritten: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._file = lock_spool(path, create=True)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a killed process left a partial line

    def append(self, kind: str, **content: Any) -> None:
        """Add an entry. A full disk is not an error: the entry is written as soon as possible."""
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
        """Write the whole line or nothing. Raises OSError."""
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
        """Close the file, which releases the lock."""
        os.close(self._file)


def lock_spool(path: Path, create: bool = False) -> int:
    """An open, exclusively locked file descriptor of ``path``. Raises UserError if it is in use.

    File systems without locks are used without them.
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
        os.close(file)  # whoever held the lock has delivered and removed the file


@dataclass
class _FirstFormat:
    """Attributes lines of the first format, which name no run, to the run entry before them."""

    key: str | None = None
    attempt: int = 0
    entry: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None

    def start(self, content: Mapping[str, Any], raw: bytes) -> None:
        """A run entry: of a new run, or of a later attempt of the run before it."""
        if self.key is not None and self._continues(content):
            self.attempt = content["time_ms"]
        else:
            self.key, self.attempt = f"{content['time_ms']:013d}-{_digest(raw)}", 0
            self.run_id = content.get("run_id")
        self.entry = content

    def _continues(self, content: Mapping[str, Any]) -> bool:
        if content == self.entry:
            return True
        if self.run_id != content.get("run_id"):
            return False
        same = ("experiment", "name", "datasets")
        return all(content.get(key) == self.entry.get(key) for key in same)

    def corrupt(self, raw: bytes) -> None:
        """What follows a corrupt line is of an unknown run if that line may have started one."""
        if not raw.startswith(tuple(b'{"kind": "%s"' % k for k in (b"metrics", b"artifact", b"finish"))):
            self.key = None


class SpoolReader:
    """The entries of a spool, by run and in order, whatever the order of the lines.

    ``sent``: by run key, the digests of entries that need no delivery. Run entries are kept in
    memory, other entries are read when they are needed.
    """

    def __init__(
        self,
        path: Path,
        sent: Mapping[str, set[str]],
        sent_bytes: int = 0,
        growing: bool = False,
    ) -> None:
        """``growing``: this process appends to the file, so a line without an end is not complete."""
        self._file = path.open("rb")
        self._growing = growing
        self._sent_bytes = sent_bytes
        """Lines of the first format before this offset are sent."""
        self.runs: dict[str, dict[int, Entry]] = {}
        """By run key and attempt, the run entries."""
        self.attempts: dict[str, set[int]] = {}
        self.corrupt: list[CorruptLine] = []
        self.first_format_key: str | None = None
        """The run that the first format's record is about."""
        self._backlog: dict[str, deque[_Place]] = {}
        self._first_format = _FirstFormat()
        self._number = 0
        self._end = 0
        self._scan(sent)

    @property
    def keys(self) -> list[str]:
        """The keys of all runs with an entry in the spool."""
        return list(self.attempts)

    def _scan(self, sent: Mapping[str, set[str]]) -> None:
        places: dict[str, list[_Place]] = {}
        seen: set[str] = set()
        while line := self._file.readline():
            if self._growing and not line.endswith(b"\n"):
                break
            offset, self._end = self._end, self._end + len(line)
            entry = self._entry(line, offset)
            if entry is None:
                continue
            key = entry.run_key
            places.setdefault(key, [])
            if entry.digest in seen:
                continue
            seen.add(entry.digest)
            if entry.kind == "run":
                self.runs.setdefault(key, {}).setdefault(entry.attempt, entry)
            if entry.digest not in sent.get(key, ()) and not self._sent_before(entry, offset):
                places[key].append(_Place(entry.attempt, entry.seq, offset, len(line)))
        for key, found in places.items():
            found.sort(key=lambda place: place.order)
            self._backlog[key] = deque(found)

    def _sent_before(self, entry: Entry, offset: int) -> bool:
        """Whether the record of the first format covers the entry. Describing a run again is safe."""
        if offset >= self._sent_bytes or "run" in entry.content:
            return False
        self.first_format_key = entry.run_key
        return entry.kind != "run"

    def _entry(self, line: bytes, offset: int) -> Entry | None:
        """Parse the next line; None if it is blank or corrupt."""
        self._number += 1
        raw = line.strip()
        if not raw:
            return None
        first = self._first_format
        try:
            content = parse_line(raw)
            if "run" in content:
                key, attempt, seq = content["run"], content["attempt"], content["seq"]
            else:
                if content["kind"] == "run":
                    first.start(content, raw)
                if first.key is None:
                    raise ValueError("no run entry before it tells which run it belongs to")
                key, attempt, seq = first.key, first.attempt, self._number
        except ValueError as error:
            first.corrupt(raw)
            text = raw.decode("utf-8", "surrogateescape")
            self.corrupt.append(CorruptLine(self._number, text, str(error)))
            return None
        self.attempts.setdefault(key, set()).add(attempt)
        return Entry(key, attempt, seq, content, _digest(b"%s %d " % (key.encode(), attempt) + raw))

    def read(self, key: str, limit: int) -> list[Entry]:
        """Take the next entries of run ``key``, at most ``limit``; first those found at the start,
        then those that this process has appended since, which are all of one run."""
        backlog = self._backlog.get(key, deque())
        entries: list[Entry] = []
        while backlog and len(entries) < limit:
            place = backlog.popleft()
            self._file.seek(place.offset)
            raw = self._file.read(place.length).strip()
            digest = _digest(b"%s %d " % (key.encode(), place.attempt) + raw)
            entries.append(Entry(key, place.attempt, place.seq, parse_line(raw), digest))
        if not entries:
            self._file.seek(self._end)
            for line in self._file:
                if len(entries) == limit or not line.endswith(b"\n"):
                    break
                offset, self._end = self._end, self._end + len(line)
                if (entry := self._entry(line, offset)) is not None:
                    if entry.kind == "run":
                        self.runs.setdefault(entry.run_key, {})[entry.attempt] = entry
                    entries.append(entry)
        return entries

    def unread(self, key: str) -> bool:
        """Whether entries of run ``key`` were not taken yet."""
        return bool(self._backlog.get(key)) or os.fstat(self._file.fileno()).st_size > self._end

    def rewind(self, key: str) -> None:
        """Read the entries of run ``key`` from the first one again, sent or not."""
        others = self._backlog
        self.corrupt, self._first_format, self._number, self._end = [], _FirstFormat(), 0, 0
        self._file.seek(0)
        self._sent_bytes = 0
        self._backlog = {}
        self._scan({})
        self._backlog = {**others, key: self._backlog[key]}

    def close(self) -> None:
        self._file.close()


def parse_line(raw: bytes) -> dict[str, Any]:
    """The content of a line. Raises ValueError with the reason if it is not an entry."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    if "run" in content:
        _require(content, "run", str)
        if not content["run"].partition("-")[0].isdecimal():
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


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def is_spool_of(path: Path, run_key: str | None) -> bool:
    """Whether every entry of ``path`` is of the run ``run_key``, or there is none."""
    reader = SpoolReader(path, {})
    try:
        return set(reader.keys) <= {run_key} and (bool(reader.keys) or not reader.corrupt)
    finally:
        reader.close()


def set_aside(spool: Path) -> Path:
    """Rename the spool of another run, with its record; returns the new path."""
    number = int(time.time())
    while (target := spool.with_name(f"{number}-{spool.name}")).exists():
        number += 1
    for path in (record_path, first_format_record_path):
        if path(spool).exists():
            path(spool).rename(path(target))
    spool.rename(target)
    return target
