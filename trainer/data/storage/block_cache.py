"""A folder of blocks of bytes that several processes share: bounded, checksummed, whole after a
kill at any time.

A block is written to ``NAME.convoy-part``, which its writer holds a lock on, and renamed when it is
whole. A lock is the kernel's (flock): it ends with its process, be it killed. So a part that nobody
has locked is a dead process's, and is taken over.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

_PAGE = 256 * 1024  # bytes under one checksum
_SUM = 32  # bytes of a SHA-256
_BLOCK, _PART = ".convoy-block", ".convoy-part"  # the folder may hold files of others
# the file that holds the bytes of all blocks, and is locked to change them
CACHE_TOTAL = "convoy-blocks.total"
# when blocks are removed, 1/20 of the bound is made free, so that the folder is seldom looked
# through
_SLACK = 20
_LOCK_SECONDS, _BETWEEN = 30.0, 0.003  # a lock is waited for; seconds between two looks


class Damaged(Exception):
    """A block's bytes are not what was written."""


class DiskBlockCache:
    """Blocks below ``folder``, ``max_bytes`` in all over everything that is in it; the least
    recently used ones go first.

    Every method raises OSError where the disk does.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def clean(self) -> None:
        """Make the folder; remove what dead processes left behind, and what is over the bound."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(f"*/*{_PART}"):
            with suppress(FileNotFoundError), part.open("rb") as file:
                if _try_lock(file) and _is_at(file, part):
                    part.unlink()
        with self._locked_total() as total:
            self._shrink(total, 0)

    def read(self, name: str, length: int, start: int, end: int) -> memoryview | None:
        """Bytes ``[start, end)`` of a block of ``length`` bytes, checked; None where there is no
        such block. Raises Damaged.
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
                raise Damaged(
                    f"has {os.fstat(file.fileno()).st_size:,} bytes instead of {_size(length):,}"
                )
            if sums != _sums(name, content, first):
                raise Damaged(
                    f"has other bytes between {begin:,} and {begin + len(content):,} than were "
                    "written"
                )
            with suppress(OSError):  # of a disk that cannot be written to
                os.utime(file.fileno())
        return memoryview(content)[start - begin : end - begin]

    @contextmanager
    def acquire(self, names: list[str]) -> Iterator[dict[str, IO[bytes]]]:
        """The right to write these blocks, for whom no other process has it. Locks one after
        another, in the order of names.

        One that another writer held for 30 s is left out: who waits must not wait for ever.
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
                        if _is_at(file, part):  # not written
                            part.unlink()

    def write(self, name: str, file: IO[bytes], content: memoryview) -> bool:
        """Fill a claimed block and give it its name; False where it does not fit into the bound."""
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
            before = (
                min(block.stat().st_size, _size(len(content))) if block.exists() else 0
            )  # a damaged one
            # counted before it is there: a kill in between counts too much, which the next look
            # through the folder corrects
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
            file.close()  # the one before has renamed or removed it
            if not locked:
                return None

    @contextmanager
    def _locked_total(self) -> Iterator[IO[bytes]]:
        with os.fdopen(
            os.open(self.folder / CACHE_TOTAL, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0
        ) as file:
            if not _wait_for_lock(file):
                raise OSError(f"{CACHE_TOTAL} is locked by a process that stands still")
            yield file

    def _shrink(self, total: IO[bytes], more: int) -> None:
        """Make room for ``more`` bytes, where they would not fit."""
        if os.fstat(total.fileno()).st_size and _get(total) + more <= self.max_bytes:
            return
        found = []
        for block in self.folder.glob(f"*/*{_BLOCK}"):
            with suppress(FileNotFoundError):
                stat = block.stat()
                found.append((stat.st_mtime_ns, stat.st_size, block))
        size = sum(size for _, size, _ in found)
        if size + more > self.max_bytes:
            wanted = self.max_bytes - (max(more, self.max_bytes // _SLACK) if more else 0)
            for _, freed, block in sorted(found):
                if size <= wanted:
                    break
                block.unlink(missing_ok=True)  # who has it open reads on
                size -= freed
                with suppress(OSError):  # others are left in it
                    block.parent.rmdir()
        _set(total, size)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}{kind}"


def _size(length: int) -> int:
    """Bytes of the file of a block: its own, then the checksum of each page."""
    return length + -(-length // _PAGE) * _SUM


def _sums(name: str, content: bytes | memoryview, first: int) -> bytes:
    """SHA-256 of each page, over its bytes, its number and the block's name: a block in another's
    place is found out.
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
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _get(total: IO[bytes]) -> int:
    text = os.pread(total.fileno(), 32, 0)
    return int(text) if text.strip().isdigit() else 2**62  # unreadable: look through the folder


def _set(total: IO[bytes], size: int) -> None:
    """In one write of a fixed length, so that a kill leaves the old number or the new one."""
    os.pwrite(total.fileno(), f"{size:020d}".encode(), 0)
    os.ftruncate(total.fileno(), 20)
