"""``convoy verify``: reads every byte of a dataset and compares it with the index."""

import hashlib
import os
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from pipelines.datasets.process_pool import worker_lost, worker_pool
from pipelines.terminal.progress_bar import WorkProgress
from trainer.data.decode.decoder import DecodeError, decode_rgb
from trainer.data.decode.image_formats import ImageFault, PngWithoutEnd, identify
from trainer.data.index import INDEX_NAME, Shard, open_index
from trainer.data.shards.tar import encoded_image, label_of, read_sample
from trainer.data.storage.store import open_store
from trainer.errors import UserError

_RANGE = 32 * 2**20  # bytes per read


@dataclass
class VerifyResult:
    """Counts of one split, and the errors found in it."""

    url: str
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    digest: str = ""
    faults: list[str] = field(default_factory=list)


def verify(url: str, workers: int = os.cpu_count() or 1) -> list[VerifyResult]:
    """Check the split at ``url``, or both splits below it.

    Raises UserError if there is no index.
    """
    store = open_store(url)
    base = url.rstrip("/")
    if store.read_small(INDEX_NAME) is not None:
        return [_verify_split(base, workers)]
    splits = [
        name for name in ("train", "val") if store.read_small(f"{name}/{INDEX_NAME}") is not None
    ]
    return [_verify_split(f"{base}/{name}", workers) for name in splits] or [
        _verify_split(base, workers)
    ]


def _verify_split(url: str, workers: int) -> VerifyResult:
    index, store = open_index(url)
    result = VerifyResult(url, shards=len(index.shards), digest=index.digest)
    check = partial(_verify_shard, store.url, len(index.classes))
    with (
        worker_pool(workers) as pool,
        WorkProgress(f"verifying {index.split}", index.samples, "images") as progress,
    ):
        try:
            for shard, faults in zip(index.shards, pool.map(check, index.shards), strict=True):
                result.faults += [f"{store.url}/{shard.name}: {fault}" for fault in faults]
                result.samples += shard.samples
                result.bytes += shard.bytes
                progress.add(shard.samples)
        except BrokenProcessPool:
            raise worker_lost() from None
    return result


def _verify_shard(url: str, num_classes: int, shard: Shard) -> list[str]:
    """Return the errors of one shard. Runs in a worker."""
    store = open_store(url)
    if fault := shard.size_fault(store.size(shard.name)):
        return [fault]
    faults: list[str] = []
    sha256 = hashlib.sha256()
    sample = 0
    while sample < shard.samples:
        first, start = sample, shard.offsets[sample]
        while sample < shard.samples and shard.offsets[sample] - start < _RANGE:
            sample += 1
        (content,) = store.read_ranges(shard.name, [start], [shard.offsets[sample]])
        sha256.update(content)
        for i in range(first, sample):
            part = content[shard.offsets[i] - start : shard.offsets[i + 1] - start]
            try:
                parts = read_sample(
                    part, shard.keys[i], f"sample {shard.keys[i]} at byte {shard.offsets[i]:,}"
                )
                label_of(parts, num_classes)
                _check_image(encoded_image(parts))
            except UserError as error:
                faults.append(str(error))
            except ImageFault as reason:
                faults.append(f"sample {shard.keys[i]} at byte {shard.offsets[i]:,}: {reason}")
    (end,) = store.read_ranges(shard.name, [shard.offsets[-1]], [shard.bytes])
    sha256.update(end)
    if fault := shard.digest_fault(sha256.hexdigest()):
        faults.insert(0, fault)
    return faults


def _check_image(encoded: memoryview) -> None:
    """Raise ImageFault for an image that `convoy pack --decode` would reject."""
    content = bytes(encoded)
    with suppress(PngWithoutEnd):  # decoding determines whether it is valid
        identify(lambda start, end: content[start:end], len(content))
    try:
        decode_rgb(content)
    except DecodeError as error:
        raise ImageFault(f"cannot be decoded: {error}") from None
