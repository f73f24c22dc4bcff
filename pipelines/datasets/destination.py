"""Inspects the destination of a pack.

It may be empty, or hold the same dataset, part of it, or something else.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.datasets.sources.item import Item, printable
from trainer.data.index import INDEX_NAME, Index, Shard, parse_index
from trainer.data.storage.location import local_path
from trainer.data.storage.store import Store, is_remote, open_store
from trainer.errors import UserError

RECORDS = ".pack"  # folder for the records of an unfinished pack, below the split
_PLAN = f"{RECORDS}/plan.json"


class PlanRecord(BaseModel):
    """Identifies the dataset that an unfinished pack writes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    resume_digest: str


@dataclass(frozen=True)
class Survey:
    """State of the destination of one split, taken before the pack is planned."""

    url: str
    split: str
    present: dict[str, int]
    """Size of each object in bytes, by name."""
    index: Index | None
    plan: str | None
    """The ``resume_digest`` of an unfinished pack; empty if its record is corrupt."""
    obsolete: list[str]
    """Objects of an earlier pack; deleted unless it is resumed."""


def check_destination(source: str, destination: str) -> None:
    """Raise UserError if the destination is not writable or overlaps the source."""
    if not destination.strip():
        raise UserError("DESTINATION is empty; name a folder or a URL")
    if any(0xDC80 <= ord(char) <= 0xDCFF for char in destination):
        raise UserError(f"{printable(destination)}: the destination's name is not UTF-8")
    if is_remote(destination):
        return
    origin = os.path.realpath(source)
    target = os.path.realpath(local_path(destination))
    existing = target
    while not os.path.lexists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError(f"{printable(destination)}: {printable(existing)} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{printable(destination)}: {printable(existing)} is not writable")
    if target == origin or target.startswith(origin.rstrip("/") + "/"):
        raise UserError(
            f"{printable(destination)}: is in the source, {printable(source)}; use a folder "
            "outside of it"
        )
    for split in ("train", "val"):
        below = os.path.join(target, split)
        if origin == below or origin.startswith(below + "/"):
            raise UserError(
                f"{printable(destination)}: packing writes to {split}/, which contains the "
                f"source, {printable(source)}"
            )


def survey(url: str, split: str, overwrite: bool) -> Survey:
    """Inspect the destination of a split; writes nothing.

    Raises UserError for files that Convoy did not write, and for corrupt records or a corrupt
    index.
    """
    if not is_remote(url) and not local_path(url).is_dir():
        return Survey(url, split, {}, None, None, [])
    store = open_store(url)
    raw = store.read_small(INDEX_NAME)
    index = None
    if raw is not None:
        try:
            index = parse_index(raw, f"{store.url}/{INDEX_NAME}")
        except UserError:
            if not overwrite:
                raise
    plan = _plan_record(store, overwrite)
    present = store.sizes()
    is_ours = raw is not None or plan is not None
    return Survey(
        store.url,
        split,
        present,
        index,
        plan,
        _obsolete(store.url, split, present, index, is_ours or overwrite),
    )


def _obsolete(
    url: str, split: str, present: dict[str, int], index: Index | None, may_delete: bool
) -> list[str]:
    indexed = {shard.name for shard in index.shards} if index is not None else set()
    packed_name = re.compile(rf"{re.escape(split)}-[0-9]{{6,}}\.tar")
    tars = [name for name in present if name.endswith(".tar")]
    deleted = [name for name in tars if name in indexed or packed_name.fullmatch(name)]
    if foreign := [name for name in tars if name not in deleted and "/" not in name]:
        raise UserError(
            f"{url}: contains {foreign[0]}, which Convoy did not pack; use another "
            "destination, or move it away"
        )
    if deleted and not may_delete:
        raise UserError(
            f"{url}: contains {deleted[0]}, which Convoy did not pack; use another "
            "destination, or --overwrite"
        )
    return [INDEX_NAME, *deleted, *(name for name in present if name.startswith(f"{RECORDS}/"))]


def _plan_record(store: Store, overwrite: bool) -> str | None:
    raw = store.read_small(_PLAN)
    if raw is None:
        return None
    try:
        return PlanRecord.model_validate_json(raw).resume_digest
    except ValidationError:
        if overwrite:
            return ""
    raise UserError(
        f"{store.url}/{_PLAN}: is not the record of an unfinished pack; it begins with "
        f"{raw[:20]!r}; if the URL is correct, delete it, or use --overwrite"
    )


def is_finished(found: Survey, digest: str, overwrite: bool) -> bool:
    """Return whether the destination contains this dataset. Raises UserError if it holds another
    one.
    """
    if found.index is None or overwrite:
        return False
    if found.index.plan == digest:
        print(
            f"convoy: {found.url} already holds this dataset ({found.index.samples:,} images)",
            file=sys.stderr,
        )
        return True
    raise UserError(
        f"{found.url}: holds another dataset of {found.index.samples:,} images; use another "
        "destination, or --overwrite"
    )


def can_resume(found: Survey, resume_digest: str, parts: int) -> bool:
    """Return whether an unfinished pack of the same images can be resumed.

    Raises UserError if several parts would clear the destination concurrently.
    """
    if found.plan == resume_digest and INDEX_NAME not in found.present:
        return True
    if parts > 1 and found.present:
        raise UserError(
            f"{found.url}: is not empty, and several parts cannot clear it concurrently; delete "
            "its content first"
        )
    return False


def clear(store: Store, found: Survey, resume_digest: str) -> None:
    """Delete the objects of an earlier pack, and record what this one writes."""
    store.delete(found.obsolete)
    store.write(_PLAN, PlanRecord(resume_digest=resume_digest).model_dump_json().encode())


def record_name(number: int) -> str:
    return f"{RECORDS}/{number:06d}.json"


def finished_shards(store: Store, split: str, shards: Sequence[Sequence[Item]]) -> dict[int, Shard]:
    """Return the shards that earlier runs completed, by number.

    A shard with a corrupt record is packed again.
    """
    present = store.sizes()
    done: dict[int, Shard] = {}
    for number, items in enumerate(shards):
        if record_name(number) not in present or not (raw := store.read_small(record_name(number))):
            continue
        try:
            shard = Shard.model_validate_json(raw)
        except ValidationError:
            print(
                f"convoy: {store.url}/{record_name(number)}: is corrupt; its shard is packed again",
                file=sys.stderr,
            )
            continue
        same = shard.name == shard_name(split, number) and shard.keys == [
            item.key for item in items
        ]
        if same and shard.size_fault(present.get(shard.name)) is None:
            done[number] = shard
    return done


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def forget_records(store: Store, num_shards: int) -> None:
    store.delete([record_name(number) for number in range(num_shards)] + [_PLAN])
    store.remove_empty_folder(RECORDS)
