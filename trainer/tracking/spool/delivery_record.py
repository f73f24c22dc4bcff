"""Records which entries of a spool MLflow has accepted, and which it has rejected."""

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class DeliveryRecord:
    """An append-only file next to a spool: the MLflow run of each run key and its accepted entries.

    Lines: ``creating KEY`` before the server is asked to create a run, ``run KEY RUN_ID`` after
    that, ``sent KEY DIGEST...`` for entries that need no further delivery. A partial line is
    ignored: its entries are sent again, which the server or `RunUploader` detects. Thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_ids: dict[str, str] = {}
        self.sent: dict[str, set[str]] = {}
        self.uncertain: set[str] = set()
        """Keys of runs that may have been created more than once."""
        self._lock = threading.Lock()
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines(
                keepends=True
            ):
                if line.endswith("\n"):
                    self._apply(line.split())

    def _apply(self, words: list[str]) -> None:
        match words:
            case ["creating", key]:
                self.uncertain.add(key)
            case ["run", key, run_id]:
                if self.run_ids.get(key) not in (None, run_id):
                    self.sent.pop(key, None)  # another run accepted those entries, not this one
                self.run_ids[key] = run_id
            case ["sent", key, *digests]:
                self.sent.setdefault(key, set()).update(digests)
            case ["certain", key]:
                self.uncertain.discard(key)

    def creating(self, key: str) -> None:
        self._append("creating", key)

    def created(self, key: str, run_id: str, certain: bool) -> None:
        """Records ``run_id`` as the run of ``key``.

        Forgets what an earlier run of that key accepted.
        """
        self._append("run", key, run_id)
        if certain:
            self._append("certain", key)

    def mark_sent(self, key: str, digests: Iterable[str]) -> None:
        """Marks entries as accepted, superseded or stored in the file of rejected entries."""
        if digests := list(digests):
            self._append("sent", key, *digests)

    def _append(self, *words: str) -> None:
        with self._lock:
            if words[0] != "sent":
                self._apply(list(words))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(" ".join(words) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class RejectedEntries:
    """A JSON Lines file of entries that MLflow rejected, each with its run and the reason.

    Thread-safe. ``added``: entries added by this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.added: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, content: Mapping[str, Any], reason: str) -> None:
        """Adds an entry, which is on disk when this returns."""
        entry = {**content, "reason": reason}
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.added.append(entry)

    def summary(self) -> str:
        """Names the first entries and the first reason."""
        names = [describe(entry) for entry in self.added]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more} ({self.added[0]['reason']})"


def describe(entry: Mapping[str, Any]) -> str:
    """Names an entry for a message: ``metric loss at step 3``, ``artifact config.json``."""
    kind = entry["kind"]
    if kind == "metrics":
        return f"metric {', '.join(map(repr, entry.get('values', ())))} at step {entry.get('step')}"
    if kind == "corrupt":
        return f"line {entry['line']}"
    if kind == "artifact":
        return f"artifact {entry.get('name') or Path(entry.get('path', '')).name}"
    if kind == "finish":
        return f"status {entry.get('status')}"
    return f"{kind} {entry.get('key', entry.get('name'))!r}"
