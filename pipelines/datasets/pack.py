"""``convoy pack``: packs images into WebDataset shards and writes an index.

Equal input and seed give equal bytes, with any number of workers.

Everything is checked before anything is written. Each shard is written with a record, and the index
is written last. A partial pack is therefore not a dataset, and a second run resumes with the
missing shards.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np

from pipelines.datasets.destination import (
    can_resume,
    check_destination,
    clear,
    finished_shards,
    forget_records,
    is_finished,
    record_name,
    shard_name,
    survey,
)
from pipelines.datasets.process_pool import worker_lost, worker_pool
from pipelines.datasets.sources.check_images import check_items, with_extension
from pipelines.datasets.sources.duplicates import Marked, leak_note
from pipelines.datasets.sources.item import Account, Item, Split, printable
from pipelines.datasets.sources.layout import Layout
from pipelines.datasets.sources.list_source import ListOptions, list_source, read_item
from pipelines.terminal.progress_bar import WorkProgress
from trainer.data.index import INDEX_NAME, Index, Shard, parse_index, write_index
from trainer.data.shards.tar import BLOCK, end_mark, write_sample
from trainer.data.storage.store import Store, open_store
from trainer.errors import UserError, shortened
from trainer.locks.run_lock import RunLock

_CHUNK = 512  # images that a worker checks per task
_NAMED = 20  # rejected files that an error lists


@dataclass(frozen=True)
class PackOptions:
    """Options of ``convoy pack``.

    ``shard_bytes``: target size of a shard; ``shards``: an exact count instead. ``part`` of
    ``parts``: the share of the shards that this run writes, if several runs pack the same dataset
    concurrently. The run that finishes last writes the index.
    """

    seed: int = 0
    shards: int | None = None
    shard_bytes: int = 128 * 2**20
    workers: int = os.cpu_count() or 1
    skip_bad: bool = False
    overwrite: bool = False
    class_names: str | None = None
    part: int = 0
    parts: int = 1
    decode: bool = False
    layout: Layout = "auto"
    nested: bool = False


@dataclass(frozen=True)
class _Plan:
    """The shards of one split, in the order in which they are written."""

    split: Split
    shards: list[list[Item]]
    digest: str  # of keys, labels, sizes and the seed; stored in the index
    resume_digest: str  # the same with modification times


def pack(source: str, destination: str, options: PackOptions) -> list[tuple[str, Index]]:
    """Pack every split of ``source`` below ``destination``.

    Returns (URL, index) of each complete split. Raises UserError.
    """
    if options.part >= options.parts:
        raise UserError(f"--part: {options.part} must be below --parts {options.parts}")
    check_destination(source, destination)
    listed = list_source(source, ListOptions(options.class_names, options.layout, options.nested))
    for split in listed.splits:
        _check_shard_count(options, split)
    # run the checks that need no image before reading millions of them
    urls = [f"{destination.rstrip('/')}/{split.name}" for split in listed.splits]
    for url, split in zip(urls, listed.splits, strict=True):
        survey(url, split.name, options.overwrite)
    lock = RunLock(
        destination,
        "convoy pack",
        None,
        "use another destination, or wait until it ends",
        _lock_name(options),
    )
    pool = worker_pool(options.workers)
    try:
        lock.acquire()
        splits = _checked(listed.splits, listed.account, pool, options)
        plans = [_plan(split, options) for split in splits]
        _report(source, splits, listed.account)
        # other parts may have written in the meantime
        surveys = [
            survey(url, split.name, options.overwrite)
            for url, split in zip(urls, splits, strict=True)
        ]
        work = list(zip(plans, surveys, strict=True))
        finished = [is_finished(found, plan.digest, options.overwrite) for plan, found in work]
        resumed = [
            done or can_resume(found, plan.resume_digest, options.parts)
            for done, (plan, found) in zip(finished, work, strict=True)
        ]
        stores = [open_store(url, create=True) for url in urls]
        for (plan, found), store, keep in zip(work, stores, resumed, strict=True):
            if not keep:
                clear(store, found, plan.resume_digest)
        packed = []
        for (plan, found), store, done in zip(work, stores, finished, strict=True):
            index = found.index if done else _write_split(plan, store, pool, options)
            if index is not None:
                packed.append((store.url, index))
        return packed
    except BrokenProcessPool:
        raise worker_lost() from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        lock.release()


def _lock_name(options: PackOptions) -> str:
    """Return the name of the lock file.

    Different parts of a dataset may be packed concurrently, but each part only once.
    """
    return "pack.lock" if options.parts == 1 else f"pack-{options.part}-of-{options.parts}.lock"


def _check_shard_count(options: PackOptions, split: Split) -> None:
    if options.shards is not None and options.shards > len(split.items):
        raise UserError(
            f"--shards: {options.shards} is more than the {len(split.items)} images of {split.name}"
        )


def _checked(
    splits: list[Split], account: Account, pool: ProcessPoolExecutor, options: PackOptions
) -> list[Split]:
    """Return the splits with the format of every image identified by its content.

    Files that cannot be packed are an error, or are omitted and listed with ``skip_bad``.
    """
    checked = [_check_split(split, account, pool, options) for split in splits]
    if account.rejected and not options.skip_bad:
        named = account.rejected[:_NAMED]
        rest = len(account.rejected) - len(named)
        total = len(account.rejected) + sum(len(marked) for marked in checked)
        more = [f"... and {rest} more"] if rest else []
        raise UserError(
            *named,
            *more,
            f"{len(account.rejected)} of {total} files cannot be packed; --skip-bad omits them",
        )
    good = []
    for split, marked in zip(splits, checked, strict=True):
        remaining = {item.label for item, _ in marked}
        if lost := sorted({item.label for item in split.items} - remaining):
            raise UserError(
                *(line for line in account.rejected[:_NAMED]),
                *shortened(
                    [
                        f"{split.name}: no image of class {printable(split.class_ids[label])} "
                        "can be packed"
                        for label in lost
                    ],
                    "classes",
                ),
                "--skip-bad does not omit classes: replace their images, or remove their folders",
            )
        good.append(Split(split.name, split.class_ids, split.classes, [item for item, _ in marked]))
    if (
        len(checked) == 2
        and good[0].items[0].pixels is None
        and (note := leak_note(checked[0], checked[1], read_item))
    ):
        account.notes.append(note)
    return good


def _check_split(
    split: Split, account: Account, pool: ProcessPoolExecutor, options: PackOptions
) -> list[Marked]:
    """Return the images that can be packed; the others are recorded as rejected."""
    if all(
        item.extension for item in split.items
    ):  # raw pixels: they were checked when they were listed
        return [(item, -1) for item in split.items]
    chunks = [split.items[i : i + _CHUNK] for i in range(0, len(split.items), _CHUNK)]
    good: list[Marked] = []
    doubtful: list[str] = []
    with WorkProgress(f"checking {split.name}", len(split.items), "images") as progress:
        for chunk, results in zip(
            chunks, pool.map(partial(check_items, decode=options.decode), chunks), strict=True
        ):
            for item, result in zip(chunk, results, strict=True):
                if result.fault:
                    account.rejected.append(f"{item.source}: {result.fault}")
                else:
                    good.append((with_extension(item, result.extension), result.checksum))
                if result.doubt:
                    doubtful.append(f"{item.source}: {result.doubt}; --decode checks it")
            progress.add(len(chunk))
    account.notes += shortened(doubtful, "such files")
    return good


def _report(source: str, splits: list[Split], account: Account) -> None:
    """Print what happened to every file of the source: one line per rule and per rejected file."""
    packed, rejected = sum(len(split.items) for split in splits), len(account.rejected)
    found = packed + account.num_skipped + rejected
    lines = [
        *account.notes,
        *account.skip_lines(),
        *(f"omitted: {line}" for line in account.rejected),
    ]
    if rejected:
        lines.append(f"{rejected:,} of {packed + rejected:,} files are omitted")
    counts = f"{packed:,} to pack, {account.num_skipped:,} skipped by a rule, {rejected:,} omitted"
    lines.append(f"{printable(source)}: {found:,} images and other files: {counts}")
    for line in lines:
        print(f"convoy: {line}", file=sys.stderr)


def _plan(split: Split, options: PackOptions) -> _Plan:
    _check_shard_count(options, split)
    count = len(split.items)
    total = sum(-(-item.size // BLOCK) * BLOCK + 3 * BLOCK for item in split.items)
    shards = options.shards or min(count, max(1, round(total / options.shard_bytes)))
    order = np.argsort(
        np.random.Generator(np.random.PCG64(options.seed)).random(count), kind="stable"
    )
    parts = [
        [split.items[i] for i in order[count * s // shards : count * (s + 1) // shards]]
        for s in range(shards)
    ]
    content, times = hashlib.sha256(), hashlib.sha256()
    content.update(
        json.dumps(["convoy-pack/1", split.class_ids, split.classes, shards, options.seed]).encode()
    )
    for item in (item for part in parts for item in part):
        line = f"{item.key} {item.label} {item.size} {item.extension}\n".encode()
        content.update(line)
        times.update(b"%d %b" % (item.changed, line))
    digest = content.hexdigest()
    return _Plan(
        split, parts, digest, hashlib.sha256(f"{digest} {times.hexdigest()}".encode()).hexdigest()
    )


def _write_split(
    plan: _Plan, store: Store, pool: ProcessPoolExecutor, options: PackOptions
) -> Index | None:
    """Write the missing shards of a split, or of this run's part of them.

    If no shard is missing afterwards, write the index and delete the records. Returns None if the
    split is incomplete.
    """
    name = plan.split.name
    done = finished_shards(store, name, plan.shards)
    missing = [
        n for n in range(len(plan.shards)) if n not in done and n % options.parts == options.part
    ]
    if done:
        print(
            f"convoy: {store.url}: resuming, {len(done)} of {len(plan.shards)} shards are complete",
            file=sys.stderr,
        )
    with WorkProgress(
        f"packing {name}", sum(len(plan.shards[n]) for n in missing), "images"
    ) as progress:
        work = {
            pool.submit(_write_shard, store.url, shard_name(name, n), n, plan.shards[n]): n
            for n in missing
        }
        for future in as_completed(work):
            done[work[future]] = future.result()
            progress.add(done[work[future]].samples)
    if options.parts > 1:
        done = finished_shards(store, name, plan.shards)
        raw = store.read_small(INDEX_NAME)
        if raw is not None:  # another part finished last and may be deleting the records
            return parse_index(raw, f"{store.url}/{INDEX_NAME}")
        if len(done) < len(plan.shards):
            print(
                f"convoy: {store.url}: {len(done)} of {len(plan.shards)} shards are complete",
                file=sys.stderr,
            )
            return None
    shards = [done[number] for number in range(len(plan.shards))]
    index = Index.of(name, plan.split.classes, plan.split.class_ids, shards, plan.digest)
    write_index(store, INDEX_NAME, index)
    forget_records(store, len(shards))
    return index


def _write_shard(url: str, name: str, number: int, items: list[Item]) -> Shard:
    """Write one shard and its record. Runs in a worker."""
    store = open_store(url)
    with store.create(name) as file:
        writer = _Hashing(file)
        offsets = [0]
        for item in items:
            write_sample(writer.write, item.key, item.extension, read_item(item), item.label)
            offsets.append(writer.count)
        writer.write(end_mark(writer.count))
    shard = Shard(
        name=name,
        samples=len(items),
        bytes=writer.count,
        sha256=writer.hexdigest(),
        offsets=offsets,
        keys=[item.key for item in items],
    )
    store.write(record_name(number), shard.model_dump_json().encode())
    return shard


class _Hashing:
    """Writes to a file, and counts and hashes the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.count += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def summary(packed: Iterable[tuple[str, Index]]) -> Iterator[str]:
    """Yield one line per split."""
    for url, index in packed:
        yield (
            f"{url}: {index.samples:,} images of {len(index.classes)} classes in "
            f"{len(index.shards)} shards, "
            f"{index.bytes / 2**20:,.1f} MiB, {index.digest[:19]}"
        )
