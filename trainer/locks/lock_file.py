"""A lock record that exactly one process can create, in a folder or in an object store.

The folder may be on a local or a network disk. Every change is conditional on the record that the
writer saw: an object is written with ``If-None-Match`` or ``If-Match``; a file is created with
``link`` and changed while ``flock`` excludes others.
"""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.data.storage.client import folder_of
from trainer.data.storage.location import local_path
from trainer.data.storage.store import Version, is_remote, open_store
from trainer.errors import UserError

_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}
_NO_LINK = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_FLOCK_SECONDS = 10.0  # others hold it for microseconds, unless they are suspended
_MAX_BYTES = 65536


@dataclass(frozen=True)
class Seen:
    """A record as it was read.

    ``version`` differs after each change and each renewal; ``written_at``: seconds since 1970, by
    the clock of the storage.
    """

    content: bytes
    version: Hashable
    written_at: float


class LockFile(Protocol):
    """The storage of one lock.

    Methods raise OSError, UserError or RetryableError if the storage fails.
    """

    @property
    def location(self) -> str:
        """Canonical name of the locked location."""

    is_atomic: bool
    """Whether conditional changes work here; known after the first ``create``."""

    def read(self) -> Seen | None: ...

    def create(self, content: bytes) -> Seen | None:
        """Creates the record. Returns None if one exists."""

    def replace(self, seen: Seen, content: bytes) -> Seen | None:
        """Replaces the record. Returns None if it is no longer ``seen``."""

    def renew(self, seen: Seen, content: bytes) -> Seen | None:
        """Gives the record a new version. Returns None if it is no longer ``seen``."""

    def delete(self, seen: Seen) -> None:
        """Deletes the record. No-op if it is no longer ``seen``."""

    def close(self) -> None:
        """Stops all waiting for an unreachable store."""


def lock_file(url: str, name: str) -> LockFile:
    """Returns the record ``name`` in a folder or object store.

    Raises UserError for an invalid URL.
    """
    return ObjectLockFile(url, name) if is_remote(url) else FolderLockFile(url, name)


class FolderLockFile:
    """A lock record in a file.

    A renewal changes only its modification time, which needs no space on a full disk.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        try:
            self._folder = folder_of(url, create=False).resolve()
        except UserError:  # the folder is missing until `create`
            self._folder = local_path(url).resolve()
        self._created_folders: list[Path] = []
        self.is_atomic = True

    @property
    def location(self) -> str:
        return str(self._folder)

    @property
    def _path(self) -> Path:
        return self._folder / self._name

    def read(self) -> Seen | None:
        try:
            # Opening makes NFS request the attributes from the server.
            with self._path.open("rb") as file:
                return _seen(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None  # `create` reports a file that is in the way

    def create(self, content: bytes) -> Seen | None:
        self._make_folder()
        with self._part(content) as (part, seen):
            try:
                os.link(part, self._path)
            except FileExistsError:
                # NFS may repeat a request that succeeded.
                return seen if part.stat().st_nlink == 2 else None
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                return self._create_exclusively(content)
            return seen

    def _create_exclusively(self, content: bytes) -> Seen | None:
        """Creates the file on file systems without hard links.

        Other processes may see the file before its content.
        """
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        try:
            os.write(file, content)
            os.fsync(file)
            return _seen(file)
        finally:
            os.close(file)

    def replace(self, seen: Seen, content: bytes) -> Seen | None:
        with self._opened_if(seen) as file:
            if file is None:
                return None
            with self._part(content) as (part, new):
                part.replace(self._path)
                return new

    def renew(self, seen: Seen, content: bytes) -> Seen | None:
        with self._opened_if(seen) as file:
            if file is None:
                return None
            now = time.time_ns()
            os.utime(file, ns=(now, now))
            return _seen(file)

    def delete(self, seen: Seen) -> None:
        with self._opened_if(seen) as file:
            if file is None:
                return
            self._path.unlink()
        for folder in self._created_folders:  # removes only empty folders
            with suppress(OSError):
                folder.rmdir()

    def close(self) -> None:
        pass

    @contextmanager
    def _opened_if(self, seen: Seen) -> Iterator[int | None]:
        """Yields the open file, locked against changes, or None if it is no longer ``seen``."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except PermissionError:  # the file belongs to another user, but can still be replaced
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            self._flock(file)
            try:
                is_current = os.stat(self._path).st_ino == os.fstat(file).st_ino
            except FileNotFoundError:
                is_current = False
            found = _seen(file)
            unchanged = is_current and (found.version, found.content) == (
                seen.version,
                seen.content,
            )
            yield file if unchanged else None
        finally:
            os.close(file)

    def _flock(self, file: int) -> None:
        give_up = time.monotonic() + _FLOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise TimeoutError(
                        errno.ETIMEDOUT, "another process holds the file", str(self._path)
                    ) from None
                time.sleep(0.01)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                self.is_atomic = False
                return

    @contextmanager
    def _part(self, content: bytes) -> Iterator[tuple[Path, Seen]]:
        """Yields a complete file with a temporary name in the same folder, and its Seen record."""
        part = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("w+b") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                seen = _seen(file.fileno())
            yield part, seen
        finally:
            part.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        missing = [
            folder for folder in (self._folder, *self._folder.parents) if not folder.exists()
        ]
        self._folder = folder_of(self._url, create=True).resolve()
        self._created_folders = missing or self._created_folders


def _seen(file: int) -> Seen:
    status = os.fstat(file)
    return Seen(os.pread(file, _MAX_BYTES, 0), (status.st_ino, status.st_mtime_ns), status.st_mtime)


class ObjectLockFile:
    """A lock record in an object.

    Detects stores without conditional writes; ``is_atomic`` is then False.
    """

    def __init__(self, url: str, name: str) -> None:
        self._store = open_store(url)
        self._name = name
        self._is_probed = False
        self.location = self._store.url
        self.is_atomic = True

    def read(self) -> Seen | None:
        found = self._store.read_versioned(self._name)
        if found is None:
            return None
        content, version, written_at = found
        return Seen(content, _hashable(version), written_at)

    def create(self, content: bytes) -> Seen | None:
        return self._probed(self._write(content, None))

    def replace(self, seen: Seen, content: bytes) -> Seen | None:
        return self._probed(self._write(content, seen))

    def renew(self, seen: Seen, content: bytes) -> Seen | None:
        return self._write(content, seen)

    def delete(self, seen: Seen) -> None:
        if self.read_own(seen.content) is not None:
            self._store.delete([self._name])

    def close(self) -> None:
        self._store.close()

    def read_own(self, content: bytes) -> Seen | None:
        found = self.read()
        return found if found is not None and found.content == content else None

    def _write(self, content: bytes, seen: Seen | None) -> Seen | None:
        if self.is_atomic:
            try:
                expected = None if seen is None else dict(seen.version)  # type: ignore[call-overload]
                version = self._store.write_if(self._name, content, expected)
            except NotImplementedError:
                self.is_atomic = False
            else:
                if version is None:  # the retry of a successful request is refused as well
                    return self.read_own(content)
                return Seen(content, _hashable(version), time.time())
        found = self.read()
        if (None if found is None else found.version) != (None if seen is None else seen.version):
            return None
        self._store.write(self._name, content)
        return self.read_own(content)

    def _probed(self, seen: Seen | None) -> Seen | None:
        """Probes whether the store honors conditions, with two writes that must be refused.

        Some stores ignore the conditions.
        """
        if seen is None or self._is_probed or not self.is_atomic:
            return seen
        bogus: Version = {"e_tag": '"00000000000000000000000000000000"', "version": "1"}
        for version in (None, bogus):
            try:
                if self._store.write_if(self._name, seen.content, version) is not None:
                    self.is_atomic = False
            except NotImplementedError:
                self.is_atomic = False
        self._is_probed = True
        return seen if self.is_atomic else self.read_own(seen.content)


def _hashable(version: Version) -> Hashable:
    return tuple(sorted(version.items()))
