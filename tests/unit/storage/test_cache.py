"""The disk cache in front of a store.

It always returns the correct bytes, fetches each block once per node, keeps its size limit and is
consistent after any kill.
"""

import hashlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.index import Index, Shard, check_digests, digest_of
from trainer.data.storage import block_cache
from trainer.data.storage.cache import Cache
from trainer.data.storage.store import Store, open_store
from trainer.errors import UserError

BLOCK = 64 * 1024
FILE = BLOCK + 32  # a block of one page, and its checksum
SIZES = {"a.tar": 10 * BLOCK + 777, "b.tar": 3 * BLOCK, "c/d.tar": 100}
DIGEST = "sha256:" + "5" * 64


def _content(name: str) -> bytes:
    return np.random.default_rng(len(name)).bytes(SIZES[name])


CONTENTS = {name: _content(name) for name in SIZES}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "c").mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def cached(
    shards: Path, folder: Path, max_bytes: int = 2**30, digest: str = DIGEST
) -> tuple[Cache, Store]:
    store = open_store(str(shards))
    return Cache(store, folder, max_bytes, digest, SIZES, BLOCK), store


def check(cache: Cache, name: str, ranges: Sequence[tuple[int, int]]) -> None:
    parts = cache.read_ranges(name, [start for start, _ in ranges], [end for _, end in ranges])
    assert [
        bytes(part) == CONTENTS[name][start:end]
        for part, (start, end) in zip(parts, ranges, strict=True)
    ] == [True] * len(ranges)


def full(name: str) -> list[tuple[int, int]]:
    return [(0, SIZES[name])]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.convoy-block"))


def used(folder: Path) -> int:
    """Bytes of all files in the folder."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return found


name_and_ranges = st.sampled_from(sorted(SIZES)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(
            st.tuples(st.integers(0, SIZES[name]), st.integers(0, SIZES[name])).map(
                lambda p: (min(p), max(p))
            ),
            max_size=4,
        ),
    )
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(reads=st.lists(name_and_ranges, max_size=6), max_blocks=st.integers(1, 20))
def test_random_ranges_are_correct_within_the_size_limit(
    shards: Path, tmp_path: Path, reads: list[tuple[str, list[tuple[int, int]]]], max_blocks: int
) -> None:
    """All examples use the same folder, with different limits."""
    cache, _ = cached(shards, tmp_path / "cache", max_blocks * FILE)
    for name, ranges in reads:
        check(cache, name, ranges)
        assert sum(path.stat().st_size for path in files(tmp_path / "cache")) <= max_blocks * FILE
    assert cache.hit_bytes + cache.missed_bytes == sum(
        end - start for _, ranges in reads for start, end in ranges
    )


def test_cached_blocks_are_not_fetched_again(shards: Path, tmp_path: Path) -> None:
    cache, store = cached(shards, tmp_path)
    assert cache.url == str(shards)
    for _ in range(3):
        for name in SIZES:
            check(cache, name, full(name))
            check(cache, name, [(5, 50), (50, 60)])
    assert store.counts.bytes == sum(SIZES.values())
    other, store = cached(shards, tmp_path)
    check(other, "a.tar", full("a.tar"))
    assert store.counts.bytes == 0
    other, store = cached(shards, tmp_path, digest="sha256:" + "6" * 64)
    check(other, "a.tar", [(0, 10)])
    assert store.counts.bytes == BLOCK, "another dataset is not cached"


def test_least_recently_used_blocks_are_evicted_first(shards: Path, tmp_path: Path) -> None:
    cache, store = cached(shards, tmp_path, 6 * FILE)
    for number in (0, 1, 2, 3, 4, 5, 0, 2, 6, 7):
        check(cache, "a.tar", [(number * BLOCK, number * BLOCK + 9)])
        time.sleep(0.01)  # resolution of the kernel's file times
    assert [int(path.name.split(".")[2]) for path in files(tmp_path)] == [0, 2, 4, 5, 6, 7]
    assert store.counts.bytes == 8 * BLOCK
    other, _ = cached(shards, tmp_path, 3 * FILE, digest="other")
    assert [int(path.name.split(".")[2]) for path in files(tmp_path)] == [2, 6, 7], (
        "a smaller limit is applied at once"
    )
    check(other, "b.tar", [(0, 3 * BLOCK)])
    assert {path.parent.name for path in files(tmp_path)} == {"other"}, (
        "the limit covers all datasets"
    )


def test_limit_below_a_block_caches_nothing(shards: Path, tmp_path: Path) -> None:
    cache, _ = cached(shards, tmp_path, 100)
    for _ in range(2):
        check(cache, "a.tar", full("a.tar"))
    assert not files(tmp_path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _swap(path: Path) -> None:
    path.write_bytes(path.with_name(path.name.replace("000001", "000002")).read_bytes())


@pytest.mark.parametrize(
    "corrupt",
    [
        _flip,
        _swap,
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, BLOCK // 2),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(bytes(FILE)),
    ],
    ids=["bit flip", "another block", "empty", "truncated", "longer", "zeros"],
)
def test_corrupt_block_is_fetched_again_and_logged(
    shards: Path, tmp_path: Path, corrupt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache, store = cached(shards, tmp_path)
    check(cache, "a.tar", full("a.tar"))
    before = store.counts.bytes
    corrupt(files(tmp_path)[1])
    for _ in range(2):
        check(cache, "a.tar", full("a.tar"))
    assert store.counts.bytes - before == BLOCK
    (line,) = [record.getMessage() for record in caplog.records]
    assert "a.tar.000001: has " in line
    assert "it is fetched again" in line
    assert int((tmp_path / "convoy-blocks.total").read_text()) >= sum(
        path.stat().st_size for path in files(tmp_path)
    )


def test_invalid_reads_and_folders_are_errors(shards: Path, tmp_path: Path) -> None:
    cache, _ = cached(shards, tmp_path)
    with pytest.raises(UserError, match="not found"):
        cache.read_ranges("nothing.tar", [0], [1])
    with pytest.raises(UserError, match=r"b\.tar: has"):
        cache.read_ranges("b.tar", [0], [SIZES["b.tar"] + 1])
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            UserError, match=r"is not a folder, so shards cannot be cached in it \(data.cache_dir\)"
        ):
            cached(shards, folder)


def test_other_files_in_the_folder_are_kept(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("x.part", "x.block", "total"):
        (tmp_path / "other" / name).write_bytes(bytes(10 * FILE))
    cache, _ = cached(shards, tmp_path, FILE)
    check(cache, "a.tar", full("a.tar"))
    assert len(list((tmp_path / "other").iterdir())) == 3
    assert (tmp_path / "empty").is_dir()


def test_concurrent_threads_fetch_a_block_once(shards: Path, tmp_path: Path) -> None:
    cache, store = cached(shards, tmp_path)
    barrier = threading.Barrier(6)

    def read(_: int) -> None:
        barrier.wait(30)
        check(cache, "a.tar", full("a.tar"))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    assert store.counts.bytes == SIZES["a.tar"]


# --- processes ------------------------------------------------------------------------------------

# the fork server has no threads, and has imported the slow modules
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["trainer.data.storage.cache", "trainer.data.index", "hypothesis", "pytest"]
)


def _read_all(shards: Path, folder: Path, start: Any, fetched: Any) -> None:
    cache, store = cached(shards, folder)
    start.wait(60)
    for name in ("a.tar", "b.tar"):
        check(cache, name, full(name))
    fetched.put(store.counts.bytes)


def test_two_processes_fetch_each_block_once(shards: Path, tmp_path: Path) -> None:
    start, fetched = _FORKS.Barrier(2), _FORKS.Queue()
    processes = [
        _FORKS.Process(target=_read_all, args=(shards, tmp_path, start, fetched)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    total = sum(fetched.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert total == SIZES["a.tar"] + SIZES["b.tar"]


_LIMIT = 5 * FILE


def _hammer(shards: Path, folder: Path, seed: int, stop: Event, reads: Any) -> None:
    draw = random.Random(seed)
    cache, _ = cached(shards, folder, _LIMIT)
    while not stop.is_set():
        name = draw.choice(["a.tar", "b.tar"])
        start = draw.randrange(SIZES[name])
        check(cache, name, [(start, min(SIZES[name], start + draw.randrange(1, 2 * BLOCK)))])
        with reads.get_lock():
            reads.value += 1


def test_killed_processes_do_not_corrupt_the_cache(shards: Path, tmp_path: Path) -> None:
    """Four processes share a small cache; three are killed at random times and replaced."""
    stop, reads = _FORKS.Event(), [_FORKS.Value("q", 0) for _ in range(4)]

    def start(number: int, seed: int) -> Any:
        process = _FORKS.Process(
            target=_hammer, args=(shards, tmp_path, seed, stop, reads[number]), daemon=True
        )
        process.start()
        return process

    processes = [start(number, number) for number in range(4)]
    draw, most = random.Random(3), 0
    try:
        for kill in range(3):
            before = [value.value for value in reads]
            wait = time.monotonic() + draw.uniform(0.2, 0.6)
            give_up = time.monotonic() + 60
            while time.monotonic() < wait or any(
                value.value < old + 20 for value, old in zip(reads, before, strict=True)
            ):
                assert time.monotonic() < give_up, "the processes hang"
                assert all(process.exitcode is None for process in processes), "a read was wrong"
                most = max(most, used(tmp_path))
                time.sleep(0.005)
            os.kill(processes[kill].pid, signal.SIGKILL)
            processes[kill].join(10)
            reads[kill] = _FORKS.Value("q", 0)  # the killed process may have held its lock
            processes[kill] = start(kill, 10 + kill)
        stop.set()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    assert most <= _LIMIT + 4 * 3 * FILE + 20, (
        "the limit, and at most three blocks per process that are being written"
    )
    cache, _ = cached(shards, tmp_path, _LIMIT)
    assert not list(tmp_path.glob("*/*.convoy-part")), "parts of killed processes are removed"
    assert used(tmp_path) <= _LIMIT + 20
    for name in SIZES:
        check(cache, name, full(name))


def test_only_parts_of_dead_processes_are_removed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("5" * 64)
    folder.mkdir()
    (folder / "a.tar.000000.convoy-part").write_bytes(b"left behind")
    held = block_cache.DiskBlockCache(tmp_path, 2**30)
    with held.acquire([f"{folder.name}/b.tar.000000"]):
        cached(shards, tmp_path)
        assert [path.name for path in folder.iterdir()] == ["b.tar.000000.convoy-part"]
    assert not list(folder.glob("*.convoy-part"))


def test_stopped_writer_does_not_block_readers(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_cache, "_LOCK_SECONDS", 0.2)
    cache, store = cached(shards, tmp_path)
    with block_cache.DiskBlockCache(tmp_path, 2**30).acquire(["5" * 64 + "/a.tar.000000"]):
        check(cache, "a.tar", [(10, 20), (BLOCK, BLOCK + 5)])
        assert store.counts.bytes == 10 + BLOCK, (
            "only the requested bytes of the locked block are fetched"
        )
    check(cache, "a.tar", [(10, 20)])
    assert store.counts.bytes == 10 + 2 * BLOCK


# --- disk errors ----------------------------------------------------------------------------------


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount file systems: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _one_line(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    return line


def test_full_disk_stops_caching_with_one_warning(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "disk"
    with _mounted(folder, f"size={4 * BLOCK}"):
        cache, store = cached(shards, folder)
        for _ in range(2):
            check(cache, "a.tar", full("a.tar"))
        assert (
            _one_line(caplog)
            == f"{folder}: No space left on device; shards are no longer cached there"
        )
        assert cache.hit_bytes > 0, "existing blocks are used"
        assert store.counts.bytes < 2 * SIZES["a.tar"] + 4 * BLOCK
        assert not list(folder.glob("*/*.convoy-part"))


def test_read_only_disk_serves_existing_blocks(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "disk"
    with _mounted(folder, "size=16m"):
        check(cached(shards, folder)[0], "a.tar", [(0, 2 * BLOCK)])
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        cache, store = cached(shards, folder)
        for _ in range(2):
            check(cache, "a.tar", full("a.tar"))
        assert (
            _one_line(caplog)
            == f"{folder}: Read-only file system; shards are no longer cached there"
        )
        assert store.counts.bytes == 2 * (SIZES["a.tar"] - 2 * BLOCK)


def test_file_size_limit_stops_caching_with_one_warning(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, store = cached(shards, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK // 2, limits[1]))
    try:
        for _ in range(2):
            check(cache, "a.tar", full("a.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _one_line(caplog) == f"{tmp_path}: File too large; shards are no longer cached there"
    assert not files(tmp_path)
    assert store.counts.bytes == 2 * SIZES["a.tar"]


# --- SHA-256 --------------------------------------------------------------------------------------


def test_check_digests_reports_differing_shards(tmp_path: Path) -> None:
    contents = {
        f"{number:02d}.tar": np.random.default_rng(number).bytes(9_000_000 if number == 0 else 1000)
        for number in range(14)
    }
    shards = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append(
            Shard(name=name, samples=0, sha256=sha256, bytes=len(content), offsets=[0], keys=[])
        )
    index = Index(
        split="train",
        samples=0,
        bytes=sum(map(len, contents.values())),
        classes=[],
        class_ids=[],
        plan="",
        digest=digest_of([], [], shards),
        shards=shards,
    )
    store = open_store(str(tmp_path))
    check_digests(index, store, range(14))
    assert store.counts.bytes == index.bytes, "each shard is read once"
    _flip(tmp_path / "00.tar")
    os.truncate(tmp_path / "01.tar", 999)
    (tmp_path / "02.tar").unlink()
    check_digests(index, store, [3, 4, 5])
    with pytest.raises(UserError) as error:
        check_digests(index, store, [0, 1, 2, 3])
    first, second, third = error.value.faults
    assert first.startswith(f"{tmp_path}/00.tar: its SHA-256 is ")
    assert f"the index says {shards[0].sha256[:16]}..." in first
    assert second == f"{tmp_path}/01.tar: has 999 bytes, the index says 1,000"
    assert third == f"{tmp_path}/02.tar: is in the index but missing"
    for number in range(14):
        (tmp_path / f"{number:02d}.tar").write_bytes(b"")
    with pytest.raises(UserError) as error:
        check_digests(index, store, range(14))
    assert len(error.value.faults) == 11
    assert error.value.faults[-1] == "... and 4 more shards"
