"""Lists folders and accounts for every entry.

An entry is listed, skipped by a rule, rejected, or a fault.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.datasets.sources.item import Account, printable
from trainer.errors import UserError

HIDDEN = "hidden, or left by a desktop system"
_LEFTOVERS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LEFTOVER_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)

_IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
        ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif", ".dds", ".psd", ".tga", ".jp2",
        ".jxl"
    }
)  # fmt: skip
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder; symbolic links are followed."""

    name: str
    path: str
    status: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


@dataclass
class Walk:
    """Lists the folders of one split; ``account`` records everything that is not listed."""

    account: Account
    _visited: dict[tuple[int, int], str] = field(default_factory=dict)

    def entries(self, folder: str, is_class: bool = True) -> list[Entry]:
        """Return the files and folders in ``folder`` by name, without skipped, rejected or faulty
        entries.

        ``is_class``: whether files in it belong to a class. Otherwise a broken link may be a class
        itself.
        """
        found = []
        for entry in self._scan(folder):
            try:
                status = entry.stat()
            except OSError as error:
                if skipped_by_name(entry.name, is_folder=False):
                    self.account.skip(HIDDEN, entry.path)
                    continue
                reason = _why_unreadable(entry, error)
                (self.account.reject if is_class else self.account.fault)(entry.path, reason)
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if skipped_by_name(entry.name, is_folder):
                self.account.skip(HIDDEN, *(files_below(entry.path) if is_folder else [entry.path]))
            elif is_folder or stat.S_ISREG(status.st_mode):
                found.append(Entry(entry.name, entry.path, status))
            else:
                kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), "not a regular file")
                self.account.reject(entry.path, f"is {kind}, not a file")
        return found

    def files(self, folder: Entry) -> Iterator[tuple[str, Entry]]:
        """Yield (folder relative to ``folder``, file) of all files below it, by name in each
        folder.
        """
        stack: list[tuple[str, Iterator[Entry]]] = []
        if self.enter(folder):
            stack.append(("", iter(self.entries(folder.path))))
        while stack:
            relative, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
            elif not entry.is_folder:
                yield relative, entry
            elif self.enter(entry):
                below = f"{relative}/{entry.name}" if relative else entry.name
                stack.append((below, iter(self.entries(entry.path))))

    def enter(self, folder: Entry) -> bool:
        """Return whether the folder is visited for the first time; loops and second paths are
        faults.
        """
        identity = (folder.status.st_dev, folder.status.st_ino)
        first = self._visited.setdefault(identity, folder.path)
        if first == folder.path:
            return True
        self.account.fault(
            folder.path, f"is the same folder as {printable(first)}; remove one of the links"
        )
        return False

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.account.fault(folder, f"cannot be listed: {error.strerror}")
            return []


def skipped_by_name(name: str, is_folder: bool) -> bool:
    """Return whether an entry is hidden, or left behind by a desktop or file system."""
    if name.startswith("."):
        return True
    return name in _LEFTOVER_FOLDERS if is_folder else name.lower() in _LEFTOVERS


def files_below(folder: str, unreadable: list[str] | None = None) -> list[str]:
    """Return the paths of all files below a skipped folder, to count them; links are not followed.

    A folder that cannot be listed counts as one file, and is added to ``unreadable``.
    """
    found: list[str] = []
    errors: list[OSError] = []
    for path, folders, names in os.walk(folder, onerror=errors.append):
        found += [os.path.join(path, name) for name in names]
        found += [
            os.path.join(path, name) for name in folders if os.path.islink(os.path.join(path, name))
        ]
    failed = [str(error.filename) for error in errors]
    if unreadable is not None:
        unreadable += failed
    return sorted(found + failed)


def looks_like_image(path: str) -> bool:
    """Return whether a file looks like an image, by its suffix or its first bytes."""
    if os.path.splitext(path)[1].lower() in _IMAGE_SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def skip_others(root: Path, used: Collection[str], rule: str, account: Account) -> None:
    """Account for everything in ``root`` except the entries in ``used``.

    Raises UserError for folders of images, because it is then ambiguous what to pack.
    """
    for name in sorted(set(os.listdir(root)) - set(used)):
        path = os.path.join(root, name)
        is_folder = os.path.isdir(path)
        is_hidden = skipped_by_name(name, is_folder)
        files = files_below(path) if is_folder else [path]
        if is_folder and not is_hidden and any(map(looks_like_image, files)):
            raise UserError(
                f"{printable(path)}: contains images, but {printable(str(root))} contains "
                f"{', '.join(sorted(used)[:2])} too, so "
                "what to pack is ambiguous; move one of them away, or name a folder as the source"
            )
        account.skip(HIDDEN if is_hidden else rule, *files)


def check_root(source: str) -> Path:
    """Return the source as a path. Raises UserError unless it is a folder that can be listed."""
    try:
        if stat.S_ISDIR(os.stat(source).st_mode):
            os.scandir(source).close()
            return Path(source)
        reason = "is a file; name the folder that contains it"
    except FileNotFoundError:
        reason = "there is no such folder"
    except OSError as error:
        reason = f"cannot be listed: {error.strerror}"
    raise UserError(f"{printable(source)}: {reason}")


def _why_unreadable(entry: os.DirEntry[str], error: OSError) -> str:
    try:
        if entry.is_symlink():
            if error.errno == errno.ELOOP:
                return "is a link that leads back to itself"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return f"is a link to {printable(os.readlink(entry.path))}, which does not exist"
    except OSError:
        pass
    return f"cannot be read: {error.strerror}"
