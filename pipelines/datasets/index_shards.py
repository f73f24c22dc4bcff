"""``convoy index``: indexes third-party WebDataset shards.

The shards are read once and are not modified.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pipelines.datasets.class_names import names_by_label
from pipelines.datasets.process_pool import worker_pool
from pipelines.datasets.shard_scan import Scan, scan_shard
from pipelines.datasets.shard_set import choose_shards, notes_on_names, split_of
from pipelines.terminal.progress_bar import WorkProgress
from trainer.data.index import INDEX_NAME, Index, digest_of, parse_index, write_index
from trainer.data.storage.store import Store, open_store
from trainer.errors import UserError, shortened

_NAMED = 5  # labels that a note lists
_MANY_CLASSES, _SPARSE = (
    1000,
    10,
)  # a highest label of 1,000 or more, and of 10 or more per distinct label, is an error


@dataclass(frozen=True)
class IndexOptions:
    """Options of ``convoy index``.

    ``split``: name of the split. Defaults to the last part of the URL or, with ``shards``, to the
    split that the shard names contain.

    ``class_names``: a file with the name of each label. ``shards``: a pattern (``*``, ``?``,
    ``[]``) of shard names, for folders that several splits share; the index is then written to
    ``URL/SPLIT/index.json``.
    """

    split: str | None = None
    class_names: str | None = None
    shards: str | None = None
    workers: int = 1
    overwrite: bool = False


def index_shards(url: str, options: IndexOptions) -> tuple[str, Index]:
    """Write the ``index.json`` of the shards below ``url``, in the order of their names.

    Returns the URL of the split, and the index. Raises UserError for shards that are corrupt,
    truncated or of several splits, and for samples that cannot be represented exactly; nothing is
    written then. Notes on ignored members go to stderr.
    """
    store = open_store(url)
    sizes = choose_shards(store, options.shards)
    split, index_name = _place(url, options, sizes)
    names = names_by_label(options.class_names) if options.class_names else None
    scans = _scan_all(url, sizes, options.workers)
    faults = [f"{url}/{scan.shard.name}: {fault}" for scan in scans for fault in scan.faults]
    faults += _changed(store, sizes, options.shards)
    if not faults:
        faults = _duplicate_keys(url, scans)
    labels = Counter(label for scan in scans for label in scan.labels)
    highest = max(labels, default=-1)
    if names is not None and highest >= len(names):
        faults.append(
            f"--class-names: {options.class_names} has {len(names)} names, but there are labels "
            f"up to {highest}"
        )
    elif names is None and highest >= _MANY_CLASSES and highest >= _SPARSE * len(labels):
        faults.append(
            f"{url}: has a label {highest}, but only {len(labels):,} distinct labels; if that is "
            "correct, name all classes with --class-names"
        )
    if faults:
        raise UserError(*shortened(faults, "faults"))
    classes = names or [str(label) for label in range(highest + 1)]
    class_ids = [str(label) for label in range(len(classes))]
    shards = [scan.shard for scan in scans]
    # these shards have no pack plan: use a digest of their content
    plan = digest_of(classes, class_ids, shards)
    shards_in: Literal["", ".."] = ".." if options.shards else ""
    index = Index.of(split, classes, class_ids, shards, plan, shards_in)
    _check_overlap(store, index_name, index)
    raw = store.read_small(index_name)
    if (
        raw is not None
        and not options.overwrite
        and parse_index(raw, f"{url}/{index_name}") != index
    ):
        raise UserError(
            f"{url}/{index_name}: exists with other content; use --overwrite to replace it"
        )
    write_index(store, index_name, index)
    for note in _notes(scans, classes, labels, sizes):
        print(f"convoy: {url}: {note}", file=sys.stderr)
    return f"{url.rstrip('/')}/{split}" if options.shards else url, index


def _place(url: str, options: IndexOptions, names: dict[str, int]) -> tuple[str, str]:
    """Return the name of the split, and of its index below ``url``. Raises UserError."""
    if not options.shards:
        return options.split or url.rstrip("/").rpartition("/")[2], INDEX_NAME
    split = options.split or split_of(next(iter(names))) or ""
    if not split or "/" in split or split.startswith("."):
        raise UserError(
            f"--split: {split!r} cannot name a folder below {url}; --shards needs it for the "
            f"index, {url}/SPLIT/{INDEX_NAME}"
        )
    if all(name.startswith(f"{split}/") for name in names):
        raise UserError(
            f"--shards: all shards that match are in {url.rstrip('/')}/{split}; index that URL, "
            "without --shards"
        )
    return split, f"{split}/{INDEX_NAME}"


def _scan_all(url: str, sizes: dict[str, int], workers: int) -> list[Scan]:
    scans = []
    with ExitStack() as stack:
        run = stack.enter_context(worker_pool(workers)).map if min(workers, len(sizes)) > 1 else map
        progress = stack.enter_context(WorkProgress("indexing", sum(sizes.values()) >> 20, "MiB"))
        for scan in run(partial(scan_shard, url), sizes, sizes.values()):
            scans.append(scan)
            progress.add(scan.shard.bytes >> 20)
    return scans


def _changed(store: Store, sizes: dict[str, int], pattern: str | None) -> list[str]:
    """Return one error per shard that was added, removed or resized during the scan."""
    now = choose_shards(store, pattern)
    names = sorted(name for name in sizes.keys() | now.keys() if sizes.get(name) != now.get(name))
    return [
        f"{store.url}/{name}: was changed while it was indexed; index again when all shards are "
        "complete"
        for name in names
    ]


def _duplicate_keys(url: str, scans: list[Scan]) -> list[str]:
    """Return one error per pair of shards that share keys."""
    shard_of: dict[str, str] = {}
    shared: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for scan in scans:
        for key in scan.shard.keys:
            first = shard_of.setdefault(key, scan.shard.name)
            if first != scan.shard.name:
                shared[first, scan.shard.name] += 1
                example.setdefault((first, scan.shard.name), key)
    return [
        f"{url}: {first} and {second} both contain a sample {example[first, second]}"
        + (f" and {count - 1:,} more equal keys" if count > 1 else "")
        + "; keys must be unique; remove one shard if it is a copy, else rename the samples"
        for (first, second), count in shared.items()
    ]


def _check_overlap(store: Store, index_name: str, index: Index) -> None:
    """Raise UserError if another split's index below the same URL contains one of the shards."""
    names = {shard.name for shard in index.shards}
    for other in sorted(store.sizes()):
        if (
            not index.shards_in
            or other == index_name
            or other.count("/") > 1
            or not other.endswith(INDEX_NAME)
        ):
            continue
        folder = other.removesuffix(INDEX_NAME)
        taken = parse_index(store.read_small(other) or b"", f"{store.url}/{other}")
        both = sorted(
            names
            & {shard.name if taken.shards_in else f"{folder}{shard.name}" for shard in taken.shards}
        )
        if both:
            raise UserError(
                f"--shards: {both[0]} is a shard of {store.url}/{other} too ({len(both)} in "
                "total), and no sample may be in two splits; delete that index if it is the wrong "
                "one"
            )


def _notes(
    scans: list[Scan], classes: list[str], labels: Counter[int], names: dict[str, int]
) -> list[str]:
    """Return notes on ignored members, labels without samples, and shard names."""
    notes = []
    if ignored := sum((scan.ignored for scan in scans), Counter()):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())
        notes.append(f"ignored members that belong to no sample: {kinds}")
    if absent := [label for label in range(len(classes)) if label not in labels]:
        rest = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
        listed = ", ".join(map(str, absent[:_NAMED]))
        notes.append(
            f"warning: {len(absent):,} of {len(classes):,} labels have no sample: {listed}{rest}"
        )
    return notes + notes_on_names(names)
