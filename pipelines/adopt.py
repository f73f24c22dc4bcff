"""``convoy index``: an index for WebDataset shards that others wrote, which are read once and stay as they are."""

import hashlib
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.pool import worker_pool
from pipelines.progress import WorkProgress
from trainer.data.index import INDEX_NAME, Index, Shard, digest_of, parse_index
from trainer.data.shard import BLOCK, IMAGES, split_name
from trainer.data.storage import Store, open_store, read_whole
from trainer.errors import UserError, shortened

_PIECE = 2**20  # bytes that are read on to a shard's end


@dataclass
class _Scan:
    """What one shard holds, and what is wrong with it."""

    shard: Shard
    labels: list[int]
    faults: list[str]


def index_shards(url: str, split: str | None, class_names: str | None, workers: int, overwrite: bool) -> Index:
    """Write ``index.json`` beside the tars at ``url``, in the order of their names.

    ``split``: its name, the last part of the URL when not given; ``class_names``: a file with the name of each label, a line
    each from label 0 on. Raises UserError for tars that are none or are cut, and for samples without image or label.
    """
    store = open_store(url)
    there = {name: size for name, size in sorted(store.sizes().items()) if name.endswith((".tar", ".tgz", ".tar.gz", ".tar.zst"))}
    if not there:
        raise UserError(f"{url}: no .tar stands there")
    if packed := [name for name in there if not name.endswith(".tar")]:
        raise UserError(f"{url}/{packed[0]}: is compressed, so that nothing in it can be read alone; unpack it to a .tar")
    names = _read_names(class_names) if class_names else None
    raw = store.read_small(INDEX_NAME)
    scans = _scan_all(url, there, workers)
    faults = [f"{url}/{scan.shard.name}: {fault}" for scan in scans for fault in scan.faults]
    highest = max((label for scan in scans for label in scan.labels), default=-1)
    if names is not None and highest >= len(names):
        faults.append(f"--class-names: {class_names} has {len(names)} lines, but there are labels up to {highest}")
    if faults:
        raise UserError(*faults)
    classes = names or [str(label) for label in range(highest + 1)]
    class_ids = [str(label) for label in range(len(classes))]
    shards = [scan.shard for scan in scans]
    plan = digest_of(classes, class_ids, shards)  # nobody planned them: they are what they are
    index = Index.of(split or url.rstrip("/").rpartition("/")[2], classes, class_ids, shards, plan)
    if raw is not None and not overwrite and parse_index(raw, f"{url}/{INDEX_NAME}") != index:
        raise UserError(f"{url}/{INDEX_NAME}: is there and says something else; --overwrite replaces it")
    store.write(INDEX_NAME, index.to_json())
    return index


def _read_names(path: str) -> list[str]:
    try:
        names = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names: {path} cannot be read: {error}") from None
    return names[:-1] if names[-1] == "" else names


def _scan_all(url: str, sizes: dict[str, int], workers: int) -> list[_Scan]:
    scans = []
    with worker_pool(workers) as pool, WorkProgress("indexing", sum(sizes.values()) >> 20, "MiB") as progress:
        for scan in pool.map(partial(_scan, url), sizes, sizes.values()):
            scans.append(scan)
            progress.add(scan.shard.bytes >> 20)
    return scans


class _Reading:
    """A shard as a file that is read once from its beginning to its end, hashed."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._pieces = read_whole(store, name, size)
        self._piece = memoryview(b"")
        self.sha256 = hashlib.sha256()

    def read(self, count: int) -> bytes:
        parts = []
        while count > 0:
            if not self._piece:
                self._piece = next(self._pieces, self._piece)
                self.sha256.update(self._piece)
                if not self._piece:
                    break
            parts.append(bytes(self._piece[:count]))
            self._piece = self._piece[count:]
            count -= len(parts[-1])
        return b"".join(parts)


def _scan(url: str, name: str, size: int) -> _Scan:
    """Read one shard. Runs in a worker."""
    reading = _Reading(open_store(url), name, size)
    keys: list[str] = []
    offsets: list[int] = []
    members: list[set[str]] = []
    labels, faults, end = [], [], 0
    try:
        with tarfile.open(fileobj=reading, mode="r|") as tar:  # type: ignore[call-overload]  # all it needs is read()
            for member in tar:
                key, extension = split_name(member.name)
                if not member.isreg() or not extension:
                    continue
                if not keys or key != keys[-1]:
                    keys.append(key)
                    offsets.append(member.offset if offsets else 0)  # what comes before the first is its own
                    members.append(set())
                members[-1].add(extension)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if extension == "cls":
                    file = tar.extractfile(member)
                    text = file.read().strip() if file else b""
                    if text.isdigit():
                        labels.append(int(text))
                    else:
                        faults.append(f"sample {key}: its label {text[:20]!r} is no class number")
    except tarfile.TarError as error:
        faults.append(f"is no tar, or is cut: {error}")
    while reading.read(_PIECE):
        pass
    if not keys:
        faults.append("holds no sample")
    for key, extensions in zip(keys, members, strict=True):
        if "cls" not in extensions or not extensions.intersection(IMAGES):
            faults.append(f"sample {key}: an image and its label (.cls) are needed, but there is: {', '.join(sorted(extensions))}")
    faults += [f"sample {key}: its members do not stand together" for key, count in Counter(keys).items() if count > 1]
    shard = Shard(name=name, samples=len(keys), sha256=reading.sha256.hexdigest(), bytes=size, offsets=[*offsets, end], keys=keys)
    return _Scan(shard, labels, shortened(faults, "faults more"))
