"""Files on the local disk: folder probes, atomic writes, and logs that survive a full disk."""

import os
import sys
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.faults.disk_errors import disk_fault

_PROBE_BYTES = 4096
_MAX_UNWRITTEN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FileSystem:
    """Bytes and inodes that an unprivileged process may still use.

    None if the file system does not report them.
    """

    device: int
    free_bytes: int | None
    free_files: int | None


def file_system(path: Path) -> FileSystem:
    """Returns the file system of ``path``, or of its nearest existing ancestor. Raises OSError."""
    path = path.absolute()
    while not os.path.exists(path):
        path = path.parent
    stat = os.statvfs(path)
    return FileSystem(
        path.stat().st_dev,
        stat.f_bavail * stat.f_frsize if stat.f_blocks else None,
        stat.f_favail if stat.f_files else None,
    )


def mib(size: float) -> str:
    """Formats a number of bytes in MiB."""
    return f"{size / 2**20:,.1f} MiB"


def cannot_write(path: Path, error: OSError, needed: int | None = None) -> str:
    """Formats a failed write as one line: the path, the reason and, if relevant, the free space."""
    why = disk_fault(error) or error.strerror or str(error)
    with suppress(OSError):
        found = file_system(path)
        if "space" in why and found.free_files == 0:
            why += " (no inodes are left)"
        elif "space" in why and found.free_bytes is not None:
            need = f"{mib(needed)} needed, " if needed is not None else ""
            why += f" ({need}{mib(found.free_bytes)} free)"
    return f"{path} cannot be written: {why}"


def probe_folder(folder: Path) -> None:
    """Creates ``folder`` and a file in it, and removes what it created. Raises OSError."""
    folder = folder.absolute()
    created: list[Path] = []
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        for path in reversed(missing):
            path.mkdir()
            created.append(path)
        probe = folder / f".convoy-probe-{uuid.uuid4().hex}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    finally:
        for path in reversed(created):
            with suppress(OSError):  # another process is already using the folder
                path.rmdir()


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file atomically, creating its folder if needed.

    Raises UserError, with needed and free space, if the disk is full or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        if disk_fault(error) is None:
            raise
        raise UserError(cannot_write(path, error, len(data))) from None


class AppendLog:
    """A file of lines that survives a full disk.

    Lines that could not be written stay in memory and are written before the next one. Thread-safe.
    ``write`` raises UserError once 64 MiB are in memory, so that the run ends before it loses any
    lines.
    """

    def __init__(self, path: Path, append: bool = True) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._unwritten = bytearray()
        self._reported = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab" if append else "wb", buffering=0)
        except OSError as error:
            if disk_fault(error) is None:
                raise
            raise UserError(cannot_write(path, error)) from None

    def write(self, line: str) -> None:
        """Appends a line."""
        with self._lock:
            self._unwritten += line.encode() + b"\n"
            error = self._flush()
            if error is not None and len(self._unwritten) > _MAX_UNWRITTEN_BYTES:
                raise UserError(f"{cannot_write(self._path, error)}; the run ends")
            if error is not None and not self._reported:
                self._print(f"{cannot_write(self._path, error)}; its lines are kept in memory")
            self._reported = error is not None

    def close(self) -> int:
        """Closes the file. Returns the number of lost lines, which is printed as well."""
        with self._lock:
            error = self._flush()
            self._file.close()
            lost = self._unwritten.count(b"\n")
            if error is not None:
                self._print(f"{cannot_write(self._path, error)}; its last {lost:,} lines are lost")
            return lost

    def _flush(self) -> OSError | None:
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
        except OSError as error:
            if disk_fault(error) is None:
                raise
            return error
        return None

    def _print(self, text: str) -> None:
        print(f"convoy: {text}", file=sys.stderr, flush=True)
