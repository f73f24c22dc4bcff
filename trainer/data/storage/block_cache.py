"""A bounded, checksummed disk cache of byte blocks that several processes share.

The cache stays consistent if a process is killed at any time. A block is written to
``NAME.convoy-part``, on which its writer holds a lock, and renamed when it is complete. The locks
are flocks: the kernel releases them when the process ends, even if it is killed. A part that is not
locked therefore belongs to a dead process and is taken over.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

_PAGE = 256 * 1024  # bytes per checksum
_SUM = 32  # bytes of a SHA-256
_BLOCK, _PART = ".convoy-block", ".convoy-part"  # distinct: the folder may hold other files
# File that holds the total size of all blocks; it is locked while blocks are added or removed.
CACHE_TOTAL = "convoy-blocks.total"
# An eviction frees at least 1/20 of the limit, so that the folder is seldom scanned.
_SLACK = 20
_LOCK_SECONDS, _BETWEEN = 30.0, 0.003  # seconds: lock timeout; polling interval


class CorruptBlock(Exception):
    """Raised if a block's bytes differ from those that were written."""


class DiskBlockCache:
    """Blocks below ``folder``, with least-recently-used eviction.

    ``max_bytes`` limits the total size of all blocks in the folder. Every method raises OSError on
    disk errors.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def clean(self) -> None:
        """Creates the folder, removes parts of dead processes, evicts blocks above the limit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(f"*/*{_PART}"):
            with suppress(FileNotFoundError), part.open("rb") as file:
                if _try_lock(file) and _is_at(file, part):
                    part.unlink()
        with self._locked_total() as total:
            self._shrink(total, 0)

    def read(self, name: str, length: int, start: int, end: int) -> memoryview | None:
        """Returns the verified bytes ``[start, end)`` of a block of ``length`` bytes.

        Returns None if the block is missing. Raises CorruptBlock.
        """
        try:
            file = self._path(name, _BLOCK).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with file:
            first, last = start // _PAGE, -(-end // _PAGE)
            begin = first * _PAGE
            content = os.pread(file.fileno(), min(last * _PAGE, length) - begin, begin)
            sums = os.pread(file.fileno(), (last - first) * _SUM, length + first * _SUM)
            if os.fstat(file.fileno()).st_size != _size(length):
                raise CorruptBlock(
                    f"has {os.fstat(file.fileno()).st_size:,} bytes instead of {_size(length):,}"
                )
            if sums != _sums(name, content, first):
                raise CorruptBlock(
                    f"has a wrong checksum between bytes {begin:,} and {begin + len(content):,}"
                )
            with suppress(OSError):  # the disk may be read-only
                os.utime(file.fileno())
        return memoryview(content)[start - begin : end - begin]

    @contextmanager
    def acquire(self, names: list[str]) -> Iterator[dict[str, IO[bytes]]]:
        """Acquires the exclusive right to write these blocks; yields the open part file of each.

        The locks are taken one after another in the order of names. A block that another writer
        holds locked for 30 s is omitted, so that no process waits forever.
        """
        with ExitStack() as stack:
            claims: dict[str, IO[bytes]] = {}
            try:
                for name in sorted(names):
                    if file := self._claim(name):
                        claims[name] = stack.enter_context(file)
                yield claims
            finally:
                for name, file in claims.items():
                    part = self._path(name, _PART)
                    with suppress(OSError):
                        if _is_at(file, part):  # the block was not written
                            part.unlink()

    def write(self, name: str, file: IO[bytes], content: memoryview) -> bool:
        """Writes an acquired block and publishes it under its name.

        Returns False if the block is larger than the cache's limit.
        """
        if _size(len(content)) > self.max_bytes:
            return False
        file.truncate(0)
        file.seek(0)
        for piece in (content, _sums(name, content, 0)):
            file.write(piece)
        file.flush()
        block = self._path(name, _BLOCK)
        with self._locked_total() as total:
            self._shrink(total, _size(len(content)))
            # An existing block is a corrupt one that is replaced.
            before = min(block.stat().st_size, _size(len(content))) if block.exists() else 0
            # Counted before the rename: a kill in between makes the total too large, which the next
            # scan of the folder corrects.
            _set(total, _get(total) + _size(len(content)) - before)
            self._path(name, _PART).rename(block)
        return True

    def _claim(self, name: str) -> IO[bytes] | None:
        part = self._path(name, _PART)
        while True:
            try:
                file = part.open("ab")
            except FileNotFoundError:
                part.parent.mkdir(parents=True, exist_ok=True)
                continue
            locked = _wait_for_lock(file)
            if locked and _is_at(file, part):
                return file
            file.close()  # the previous lock holder has renamed or removed it
            if not locked:
                return None

    @contextmanager
    def _locked_total(self) -> Iterator[IO[bytes]]:
        with os.fdopen(
            os.open(self.folder / CACHE_TOTAL, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0
        ) as file:
            if not _wait_for_lock(file):
                raise OSError(f"{CACHE_TOTAL} is locked by a process that does not release it")
            yield file

    def _shrink(self, total: IO[bytes], more: int) -> None:
        """Evicts blocks until ``more`` bytes fit below the limit."""
        if os.fstat(total.fileno()).st_size and _get(total) + more <= self.max_bytes:
            return
        found = []
        for block in self.folder.glob(f"*/*{_BLOCK}"):
            with suppress(FileNotFoundError):
                stat = block.stat()
                found.append((stat.st_mtime_ns, stat.st_size, block))
        size = sum(size for _, size, _ in found)
        if size + more > self.max_bytes:
            target = self.max_bytes - (max(more, self.max_bytes // _SLACK) if more else 0)
            for _, freed, block in sorted(found):
                if size <= target:
                    break
                block.unlink(missing_ok=True)  # processes that have it open can still read it
                size -= freed
                with suppress(OSError):  # the folder is not empty
                    block.parent.rmdir()
        _set(total, size)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}{kind}"


def _size(length: int) -> int:
    """Returns the size of a block's file in bytes: its content, then the checksum of each page."""
    return length + -(-length // _PAGE) * _SUM


def _sums(name: str, content: bytes | memoryview, first: int) -> bytes:
    """Returns the SHA-256 of each page, over its bytes, its number and the block's name.

    The name and number reveal a page that is stored in another page's place.
    """
    pages = (content[at : at + _PAGE] for at in range(0, len(content), _PAGE))
    return b"".join(_sum(name, number, page) for number, page in enumerate(pages, first))


def _sum(name: str, number: int, page: bytes | memoryview) -> bytes:
    sha256 = hashlib.sha256(page)
    sha256.update(f"{name} {number}".encode())
    return sha256.digest()


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_lock(file: IO[bytes]) -> bool:
    give_up = time.monotonic() + _LOCK_SECONDS
    while not _try_lock(file):
        if time.monotonic() > give_up:
            return False
        time.sleep(_BETWEEN)
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _get(total: IO[bytes]) -> int:
    text = os.pread(total.fileno(), 32, 0)
    return int(text) if text.strip().isdigit() else 2**62  # unreadable: forces a scan of the folder


def _set(total: IO[bytes], size: int) -> None:
    """Writes the total.

    A single write of fixed length ensures that a kill leaves either the old or the new number.
    """
    os.pwrite(total.fileno(), f"{size:020d}".encode(), 0)
    os.ftruncate(total.fileno(), 20)
