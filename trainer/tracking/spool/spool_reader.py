"""Reads a spool: its runs, their entries in order, and the lines that are not entries."""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.tracking.spool.spool import CorruptLine, Entry, line_digest, parse_line


@dataclass(frozen=True, slots=True)
class _Place:
    """Position of an entry in the file; positions are ordered by delivery."""

    attempt: int
    seq: int
    offset: int
    length: int

    @property
    def order(self) -> tuple[int, int, int]:
        return self.attempt, self.seq, self.offset


@dataclass
class _FirstFormat:
    """Assigns lines of the first format, which name no run, to the preceding run entry."""

    key: str | None = None
    attempt: int = 0
    entry: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None

    def start(self, content: Mapping[str, Any], raw: bytes) -> None:
        """Processes a run entry: it starts a new run, or a later attempt of the preceding run."""
        if self.key is not None and self._continues(content):
            self.attempt = content["time_ms"]
        else:
            self.key, self.attempt = f"{content['time_ms']:013d}-{line_digest(raw)}", 0
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
        """Processes a corrupt line.

        If it may have started a run, the lines after it belong to an unknown run.
        """
        if not raw.startswith(
            tuple(b'{"kind": "%s"' % k for k in (b"metrics", b"artifact", b"finish"))
        ):
            self.key = None


class SpoolReader:
    """The entries of a spool, by run and in order, regardless of the order of the lines.

    ``sent``: by run key, the digests of entries that need no delivery. Run entries are kept in
    memory; other entries are read on demand.
    """

    def __init__(
        self,
        path: Path,
        sent: Mapping[str, set[str]],
        sent_bytes: int = 0,
        growing: bool = False,
    ) -> None:
        """Opens and scans the spool.

        ``growing``: this process appends to the file, so a line without a newline is incomplete.
        """
        self._file = path.open("rb")
        self._growing = growing
        self._sent_bytes = sent_bytes
        """Lines of the first format before this offset were sent."""
        self.runs: dict[str, dict[int, Entry]] = {}
        """Run entries, by run key and attempt."""
        self.attempts: dict[str, set[int]] = {}
        self.corrupt: list[CorruptLine] = []
        self.first_format_key: str | None = None
        """Key of the run that the record of the first format describes."""
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
        """Returns whether the record of the first format covers the entry.

        Describing a run again is safe.
        """
        if offset >= self._sent_bytes or "run" in entry.content:
            return False
        self.first_format_key = entry.run_key
        return entry.kind != "run"

    def _entry(self, line: bytes, offset: int) -> Entry | None:
        """Parses the next line; returns None if it is blank or corrupt."""
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
                    raise ValueError("names no run, and no run entry precedes it")
                key, attempt, seq = first.key, first.attempt, self._number
        except ValueError as error:
            first.corrupt(raw)
            text = raw.decode("utf-8", "surrogateescape")
            self.corrupt.append(CorruptLine(self._number, text, str(error)))
            return None
        self.attempts.setdefault(key, set()).add(attempt)
        return Entry(
            key, attempt, seq, content, line_digest(b"%s %d " % (key.encode(), attempt) + raw)
        )

    def read(self, key: str, limit: int) -> list[Entry]:
        """Returns the next entries of run ``key``, at most ``limit``.

        Entries found at startup come first, then those that this process has appended since, which
        are all of one run.
        """
        backlog = self._backlog.get(key, deque())
        entries: list[Entry] = []
        while backlog and len(entries) < limit:
            place = backlog.popleft()
            self._file.seek(place.offset)
            raw = self._file.read(place.length).strip()
            digest = line_digest(b"%s %d " % (key.encode(), place.attempt) + raw)
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
        """Returns whether run ``key`` has entries that were not read yet."""
        return bool(self._backlog.get(key)) or os.fstat(self._file.fileno()).st_size > self._end

    def rewind(self, key: str) -> None:
        """Starts over at the first entry of run ``key``, including entries that were sent."""
        others = self._backlog
        self.corrupt, self._first_format, self._number, self._end = [], _FirstFormat(), 0, 0
        self._file.seek(0)
        self._sent_bytes = 0
        self._backlog = {}
        self._scan({})
        self._backlog = {**others, key: self._backlog[key]}

    def close(self) -> None:
        self._file.close()


def find_attempts(path: Path, run_key: str | None) -> set[int] | None:
    """Return the attempts of run ``run_key`` in the spool ``path``, or None if it is another run's.

    A spool belongs to the run if all of its entries do. A spool of only corrupt lines belongs to
    no run; an empty one, or one that does not exist, belongs to any.
    """
    if not path.exists():
        return set()
    reader = SpoolReader(path, {})
    try:
        if set(reader.keys) <= {run_key} and (reader.keys or not reader.corrupt):
            return reader.attempts.get(str(run_key), set())
        return None
    finally:
        reader.close()
