"""``convoy pack``: images to WebDataset shards and an index. Equal input and seed give equal bytes, on any number of workers.

The shards come first, each with a record beside it; the index comes last, so what is half-written is no data set, and a
second run goes on where the first one stopped.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import IO

import numpy as np

from pipelines.pool import worker_pool
from pipelines.progress import WorkProgress
from pipelines.sources import Item, Split, find_splits, read_item, recognized
from trainer.data.index import INDEX_NAME, Index, Shard, parse_index
from trainer.data.shard import BLOCK, end_mark, write_sample
from trainer.data.storage import Store, is_remote, open_store
from trainer.errors import UserError

_WORK = ".pack"  # records of an unfinished pack, below the split
_CHUNK = 512  # images that a worker looks at before it reports
_NAMED = 20  # faults that are named one by one


@dataclass(frozen=True)
class PackOptions:
    """``shard_bytes``: the size to aim at; ``shards``: an exact count instead. ``part`` of ``parts``: the share of the shards that
    this run writes, where several pack the same at a time; whichever comes last writes the index."""

    seed: int = 0
    shards: int | None = None
    shard_bytes: int = 128 * 2**20
    workers: int = os.cpu_count() or 1
    skip_bad: bool = False
    overwrite: bool = False
    class_names: str | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class _Plan:
    """One split's shards, in the order in which they will be written."""

    split: Split
    shards: list[list[Item]]
    digest: str  # of keys, labels, sizes and the seed: stands in the index
    resume_digest: str  # the same with modification times


def pack(source: str, destination: str, options: PackOptions) -> list[tuple[str, Index]]:
    """Pack every split of ``source`` below ``destination``; returns (URL, index) of each that is whole. Raises UserError."""
    if options.part >= options.parts:
        raise UserError(f"--part: {options.part} is not below --parts {options.parts}")
    splits = find_splits(source, options.class_names)
    if is_remote(destination):  # one that cannot be reached is told before millions of images are looked at
        open_store(destination).read_small(INDEX_NAME)
    pool = worker_pool(options.workers)
    try:
        plans = [_plan(_checked(split, pool, options), options) for split in splits]
        stores = [open_store(f"{destination.rstrip('/')}/{plan.split.name}", create=True) for plan in plans]
        finished = [_prepare(plan, store, options) for plan, store in zip(plans, stores, strict=True)]
        packed = []
        for plan, store, index in zip(plans, stores, finished, strict=True):
            index = index or _write_split(plan, store, pool, options)
            if index is not None:
                packed.append((store.url, index))
        return packed
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _checked(split: Split, pool: ProcessPoolExecutor, options: PackOptions) -> Split:
    """The split with every image recognized by its content; what is none is refused, or left out and told."""
    if all(item.extension for item in split.items):
        return split
    chunks = [split.items[i : i + _CHUNK] for i in range(0, len(split.items), _CHUNK)]
    good: list[Item] = []
    bad: list[str] = []
    with WorkProgress(f"checking {split.name}", len(split.items), "images") as progress:
        for chunk, results in zip(chunks, pool.map(_recognize, chunks), strict=True):
            for item, result in zip(chunk, results, strict=True):
                if isinstance(result, Item):
                    good.append(result)
                else:
                    bad.append(f"{item.source}: {result}")
            progress.add(len(chunk))
    if bad:
        named = bad[:_NAMED] + ([f"... and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else [])
        if not options.skip_bad:
            raise UserError(*named, f"{len(bad)} of {len(split.items)} files cannot be packed; --skip-bad leaves them out")
        for line in (*named, f"{len(bad)} of {len(split.items)} files are left out"):
            print(f"convoy: {line}", file=sys.stderr)
    if not good:
        raise UserError(f"{split.name}: no image is left to pack")
    return Split(split.name, split.class_ids, split.classes, good)


def _recognize(items: list[Item]) -> list[Item | str]:
    return [recognized(item) for item in items]


def _plan(split: Split, options: PackOptions) -> _Plan:
    count = len(split.items)
    total = sum(-(-item.size // BLOCK) * BLOCK + 3 * BLOCK for item in split.items)
    shards = options.shards or max(1, round(total / options.shard_bytes))
    if shards > count:
        raise UserError(f"--shards: {shards} is more than the {count} images of {split.name}")
    order = np.argsort(np.random.Generator(np.random.PCG64(options.seed)).random(count), kind="stable")
    parts = [[split.items[i] for i in order[count * s // shards : count * (s + 1) // shards]] for s in range(shards)]
    facts, times = hashlib.sha256(), hashlib.sha256()
    facts.update(json.dumps(["convoy-pack/1", split.class_ids, split.classes, shards, options.seed]).encode())
    for item in (item for part in parts for item in part):
        line = f"{item.key} {item.label} {item.size} {item.extension}\n".encode()
        facts.update(line)
        times.update(b"%d %b" % (item.changed, line))
    digest = facts.hexdigest()
    return _Plan(split, parts, digest, hashlib.sha256(f"{digest} {times.hexdigest()}".encode()).hexdigest())


def _prepare(plan: _Plan, store: Store, options: PackOptions) -> Index | None:
    """Look at what the destination holds: the finished index where it is this data set already; else room is made for it."""
    there = store.sizes()
    ours = (store.read_record(f"{_WORK}/plan.json") or {}).get("resume_digest")
    raw = store.read_small(INDEX_NAME)
    if raw is not None and not options.overwrite:
        index = parse_index(raw, f"{store.url}/{INDEX_NAME}")
        if index.plan == plan.digest:
            print(f"convoy: {store.url} holds this data set already ({index.samples:,} images)", file=sys.stderr)
            return index
        raise UserError(f"{store.url}: holds another data set of {index.samples:,} images; use another place, or --overwrite")
    tars = [name for name in there if name.endswith(".tar")]
    if tars and raw is None and ours is None and not options.overwrite:
        raise UserError(f"{store.url}: holds {tars[0]}, which Convoy did not pack; use another place, or --overwrite")
    if ours != plan.resume_digest or raw is not None:
        if options.parts > 1 and there:
            raise UserError(f"{store.url}: is not empty; several parts cannot clear it at a time: remove what is there")
        leftovers = [name for name in there if name.startswith(f"{_WORK}/") or name in tars]
        store.delete([INDEX_NAME, *leftovers])
        store.write(f"{_WORK}/plan.json", json.dumps({"resume_digest": plan.resume_digest}).encode())
    return None


def _write_split(plan: _Plan, store: Store, pool: ProcessPoolExecutor, options: PackOptions) -> Index | None:
    """Write what is missing of a split's shards, or of one part of them; then the index, where none is missing any more, and
    forget the records."""
    name = plan.split.name
    done = _written(plan, store)
    missing = [n for n in range(len(plan.shards)) if n not in done and n % options.parts == options.part]
    if done:
        print(f"convoy: {store.url}: going on, {len(done)} of {len(plan.shards)} shards are there", file=sys.stderr)
    with WorkProgress(f"packing {name}", sum(len(plan.shards[n]) for n in missing), "images") as progress:
        work = {pool.submit(_write_shard, store.url, f"{name}-{n:06d}.tar", n, plan.shards[n]): n for n in missing}
        for future in as_completed(work):
            done[work[future]] = future.result()
            progress.add(done[work[future]].samples)
    if options.parts > 1:
        done = _written(plan, store)
        raw = store.read_small(INDEX_NAME)
        if raw is not None:  # another part was last, and may be removing the records
            return parse_index(raw, f"{store.url}/{INDEX_NAME}")
        if len(done) < len(plan.shards):
            print(f"convoy: {store.url}: {len(done)} of {len(plan.shards)} shards are there", file=sys.stderr)
            return None
    shards = [done[number] for number in range(len(plan.shards))]
    index = Index.of(name, plan.split.classes, plan.split.class_ids, shards, plan.digest)
    store.write(INDEX_NAME, index.to_json())
    store.delete([f"{_WORK}/{number:06d}.json" for number in range(len(shards))] + [f"{_WORK}/plan.json"])
    store.remove_empty_folder(_WORK)
    return index


def _written(plan: _Plan, store: Store) -> dict[int, Shard]:
    """The shards that are there whole, by number."""
    there = store.sizes()
    done: dict[int, Shard] = {}
    for number in range(len(plan.shards)):
        if f"{_WORK}/{number:06d}.json" in there and (record := store.read_small(f"{_WORK}/{number:06d}.json")):
            shard = Shard.model_validate_json(record)
            if there.get(shard.name) == shard.bytes:
                done[number] = shard
    return done


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
    store.write(f"{_WORK}/{number:06d}.json", shard.model_dump_json().encode())
    return shard


class _Hashing:
    """Writes through to a file, counting and hashing."""

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
    """A line for each split."""
    for url, index in packed:
        yield (
            f"{url}: {index.samples:,} images of {len(index.classes)} classes in {len(index.shards)} shards, "
            f"{index.bytes / 2**20:,.1f} MiB, {index.digest[:19]}"
        )
