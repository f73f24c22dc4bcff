"""The run lock: one owner per location, in a folder and in an object store, with short leases."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from support.helpers import until

from pipelines.cli import main as cli
from pipelines.datasets.pack import PackOptions, pack
from pipelines.local import demo
from trainer.data.storage.store import Store, Version, open_store
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.errors import UserError
from trainer.locks.lock_owner import is_of_another_job, pod_identity
from trainer.locks.run_lock import LOCK_NAME, LockHeld, LockLost, RunLock, RunLocks, owner_of
from trainer.tracking import MlflowTracker
from trainer.training.checkpoint import Checkpoint, CheckpointManager

LEASE = 0.6
LONG = 60.0


def _lock(url: object, lease: float = LONG, run: str = "mine", **changes: object) -> RunLock:
    """Return a lock that does not exit when it is taken over.

    ``changes``: changed fields of its owner's record.
    """
    lock = RunLock(
        str(url),
        "convoy train",
        run,
        "use another location",
        lease_seconds=lease,
        on_taken_over=lambda error: None,
    )
    process = {
        key: changes.pop(key)
        for key in list(changes)
        if key in ("host", "pid", "start_ticks", "pid_namespace", "boot_id")
    }
    lock.owner = dataclasses.replace(
        lock.owner, process=dataclasses.replace(lock.owner.process, **process), **changes
    )
    return lock


@contextmanager
def _held(lock: RunLock) -> Iterator[RunLock]:
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _abandon(lock: RunLock) -> None:
    """Acquire the lock and stop renewing it, as a killed process does."""
    lock.acquire()
    lock._stop.set()


def _seconds_to_acquire(lock: RunLock) -> float:
    started = time.monotonic()
    with _held(lock):
        return time.monotonic() - started


@pytest.fixture(params=["folder", "object store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "locked")
    environment = request.getfixturevalue("service_env")
    monkeypatch = request.getfixturevalue("monkeypatch")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"{request.getfixturevalue('bucket')}/locks/{tmp_path.name}"


def test_second_owner_is_rejected_with_one_line_that_names_the_first(url: str) -> None:
    with _held(_lock(url)):
        with pytest.raises(LockHeld) as error:
            _lock(url).acquire()
        (line,) = str(error.value).splitlines()
        for part in (
            url,
            "run 'mine'",
            socket.gethostname(),
            f"pid {os.getpid()}",
            "since 20",
            "use another location",
            "expires after",
        ):
            assert part in line
    with _held(_lock(url)):
        pass


def test_release_removes_the_lock_and_its_empty_folder(url: str, tmp_path: Path) -> None:
    with _held(_lock(url)):
        assert owner_of(url) is not None
    assert owner_of(url) is None
    if "://" in url:
        assert open_store(url).sizes() == {}
    else:
        assert list(tmp_path.iterdir()) == [], (
            "a folder that the lock created is removed if it is empty"
        )


def test_concurrent_acquires_have_exactly_one_owner(url: str) -> None:
    for round_ in range(8 if "://" not in url else 4):
        location, barrier = f"{url}/{round_}", threading.Barrier(4)
        owners: list[RunLock] = []
        rejected: list[LockHeld] = []

        def start(
            location: str = location,
            barrier: threading.Barrier = barrier,
            owners: list[RunLock] = owners,
            rejected: list[LockHeld] = rejected,
        ) -> None:
            lock = _lock(location)
            barrier.wait()
            try:
                lock.acquire()
                owners.append(lock)
            except LockHeld as error:
                rejected.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(owners), len(rejected)) == (1, 3)
        owners[0].check()
        owners[0].release()


def _contend(folder: Path, barrier: object, rounds: int, seed: int) -> None:
    """Acquire the lock of a dead process in each round; if that succeeds, create a file."""
    for number in range(rounds):
        lock = _lock(folder / str(number))
        barrier.wait()  # type: ignore[attr-defined]
        try:
            lock.acquire()
        except LockHeld:
            pass
        else:
            (folder / f"{number}-owned-by-{seed}").touch()
        barrier.wait()  # type: ignore[attr-defined]
        lock.release()


def test_exactly_one_process_takes_over_a_stale_lock(tmp_path: Path) -> None:
    """Several processes see the same stale lock at the same time."""
    context, rounds = multiprocessing.get_context("fork"), 30
    with subprocess.Popen(["true"]) as dead:
        pass
    for number in range(rounds):
        _abandon(_lock(tmp_path / str(number), pid=dead.pid))
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_contend, args=(tmp_path, barrier, rounds, seed))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    owners = [len(list(tmp_path.glob(f"{number}-owned-by-*"))) for number in range(rounds)]
    assert owners == [1] * rounds


KILLED = """
import os, signal, sys
from trainer.locks.run_lock import RunLock
RunLock(sys.argv[1], "convoy train", "killed", "").acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lock_of_killed_process_is_taken_over_immediately(tmp_path: Path) -> None:
    """The process is still a zombie, because its parent has not reaped it."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[3]
    )
    try:
        until(
            lambda: (
                Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            )
        )
        assert owner_of(str(tmp_path)).run == "killed"
        assert _seconds_to_acquire(_lock(tmp_path)) < LONG / 2
    finally:
        process.wait()


def test_reused_pid_does_not_keep_a_lock_alive(url: str) -> None:
    _abandon(_lock(url, start_ticks=1))
    assert _seconds_to_acquire(_lock(url)) < LONG / 2


@pytest.mark.parametrize(
    "change", [{"host": "node-b"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}], ids=str
)
def test_lock_of_dead_process_on_another_host_expires_after_its_lease(
    tmp_path: Path, change: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _abandon(_lock(tmp_path, LEASE, **change))
    assert LEASE < _seconds_to_acquire(_lock(tmp_path)) < LONG / 2
    output = capsys.readouterr().out
    assert output.startswith(f"waiting: {tmp_path}: owned by run 'mine'")
    assert "its lock expires if it is not renewed within 1 s" in output
    assert len(output.splitlines()) == 1


def test_live_owner_on_another_host_is_detected_by_renewals_not_clocks(url: str) -> None:
    with _held(_lock(url, host="node-b")) as lock:
        if "://" not in url:
            os.utime(Path(url) / LOCK_NAME, (1, 1))  # in 1970
        renewal = threading.Timer(0.5, lock._renew)
        renewal.start()
        with pytest.raises(LockHeld, match="node-b"):
            _lock(url).acquire()
        renewal.join()
        lock.check()


def test_restarted_pod_of_the_same_job_takes_over_immediately(url: str) -> None:
    environment = {
        "PET_RDZV_ENDPOINT": "r-worker-0:1",
        "PET_RDZV_ID": "r",
        "CONVOY_NAMESPACE": "team",
    }
    pod = pod_identity(environment)
    assert pod == f"team/r/{socket.gethostname()}"
    with _held(_lock(url, pod=pod, pid_namespace="pid:[1]")) as old:
        assert _seconds_to_acquire(_lock(url, pod=pod)) < LONG / 2, "the previous pod has ended"
        old._renew()
        with pytest.raises(LockLost):
            old.check()


def test_pod_of_the_same_job_name_in_another_namespace_waits(tmp_path: Path) -> None:
    _abandon(_lock(tmp_path, LEASE, pod="a/r/r-worker-0", pid_namespace="pid:[1]"))
    assert _seconds_to_acquire(_lock(tmp_path, pod="b/r/r-worker-0")) > LEASE


def test_pod_identity_is_none_outside_of_a_job() -> None:
    assert pod_identity({"HOSTNAME": "x"}) is None
    assert pod_identity({"PET_RDZV_ID": "x"}) is None


def test_start_is_not_counted_if_another_job_owns_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.distributed.pod_startup import STARTS, check_restart_budget

    monkeypatch.setenv("PET_RDZV_ENDPOINT", "b-worker-0:1")
    monkeypatch.setenv("PET_RDZV_ID", "b")
    check_restart_budget(str(tmp_path), 3)
    with _held(_lock(tmp_path, pod="/a/a-worker-0")):
        assert is_of_another_job(owner_of(str(tmp_path)))
        check_restart_budget(str(tmp_path), 3)
    with _held(_lock(tmp_path, pod="/b/b-worker-0")):
        check_restart_budget(str(tmp_path), 3)
    assert json.loads((tmp_path / STARTS).read_text())["starts"] == 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"token": "x"}', b"\xff\xfe", b"null", b"[" * 9999], ids=repr
)
def test_corrupt_lock_is_replaced_after_a_lease(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    assert 0.1 < _seconds_to_acquire(_lock(tmp_path, 0.1)) < 10


def test_truncated_lock_has_no_owner(tmp_path: Path) -> None:
    with _held(_lock(tmp_path)) as lock:
        content = (tmp_path / LOCK_NAME).read_bytes()
        assert owner_of(str(tmp_path)) == lock.owner
    for size in range(0, len(content) - 2, 7):
        (tmp_path / LOCK_NAME).write_bytes(content[:size])
        assert owner_of(str(tmp_path)) is None


def test_deleted_lock_is_recreated_by_its_owner(url: str) -> None:
    with _held(_lock(url)) as lock:
        if "://" in url:
            open_store(url).delete([LOCK_NAME])
        else:
            (Path(url) / LOCK_NAME).unlink()
        lock._renew()
        lock.check()
        with pytest.raises(LockHeld):
            _lock(url).acquire()


def test_touched_lock_remains_with_its_owner(tmp_path: Path) -> None:
    with _held(_lock(tmp_path)) as lock:
        os.utime(tmp_path / LOCK_NAME, (1, 1))
        lock._renew()
        lock.check()
        assert (tmp_path / LOCK_NAME).stat().st_mtime > 1, "other processes must see the renewal"
    assert list(tmp_path.iterdir()) == []


def test_copy_of_a_live_runs_folder_is_usable_after_a_lease(tmp_path: Path) -> None:
    with _held(_lock(tmp_path / "first", LEASE)):
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / LOCK_NAME).write_bytes((tmp_path / "first" / LOCK_NAME).read_bytes())
        assert _seconds_to_acquire(_lock(tmp_path / "copy")) < 10


@pytest.mark.parametrize(
    "name", ["link", "folder/", "./folder", "folder/../folder", "file"], ids=str
)
def test_different_paths_of_one_folder_share_a_lock(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with _held(_lock(tmp_path / "folder")), pytest.raises(LockHeld):
        _lock(f"file://{tmp_path}/folder" if name == "file" else name).acquire()


def test_release_after_takeover_keeps_the_new_lock(url: str) -> None:
    old, new = _lock(url, pod="a/b/c", pid_namespace="pid:[1]"), _lock(url, pod="a/b/c")
    with _held(old), _held(new):
        old.release()
        new._renew()
        new.check()
        assert owner_of(url) == new.owner


def test_storage_outage_shorter_than_a_lease_keeps_the_lock(
    url: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    with _held(_lock(url)) as lock:
        with _unreachable(lock, monkeypatch):
            lock._renew()
            lock.check()
        lock._renew()
        lock.check()
    lines = capfd.readouterr().err.splitlines()
    assert "run.lock could not be renewed (Input/output error); this process exits in" in lines[0]
    assert lines[0].endswith(" s unless a renewal succeeds")
    assert lines[1].endswith("run.lock is renewed again")


def test_owner_with_expired_lease_waits_for_renewal_before_writing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _held(_lock(url, LEASE)) as lock:
        lock._outage = LONG
        written: list[float] = []

        def write() -> None:
            lock.check()
            written.append(time.monotonic())

        with _unreachable(lock, monkeypatch):
            until(lambda: lock._age() > LEASE)
            writer = threading.Thread(target=write)
            writer.start()
            writer.join(0.1)
            assert written == []
        writer.join(10)
        assert len(written) == 1


def test_owner_loses_the_lock_after_a_long_storage_outage(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = _lock(url, 0.2)
    with _held(lock), _unreachable(lock, monkeypatch):
        until(lambda: lock._age() > lock._outage)
        with pytest.raises(
            LockLost,
            match=r"could not be renewed for \d+ s; this process stops writing there and exits",
        ):
            lock.check()
        with pytest.raises(LockLost):
            lock.check()


@contextmanager
def _unreachable(lock: RunLock, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fails(*_: object) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(lock._file, "renew", fails)
        yield


WRITER = """
import sys, time
from trainer.locks.run_lock import LockLost, RunLock
lock = RunLock(sys.argv[1], "convoy train", "stopped", "", lease_seconds=float(sys.argv[2]))
lock.acquire()
while True:
    try:
        lock.check()
    except LockLost:
        time.sleep(60)  # the renewal thread exits the process
    with open(sys.argv[1] + "/written", "a") as file:
        file.write("x")
    time.sleep(0.01)
"""


@contextmanager
def _writer(folder: Path) -> Iterator[subprocess.Popen]:
    """Start a process that owns the folder and writes to it, and suspend it."""
    command = [sys.executable, "-c", WRITER, folder, str(LEASE)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: (folder / "written").exists())
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


def test_suspended_process_exits_with_144_without_writing_after_takeover(
    tmp_path: Path,
) -> None:
    with _writer(tmp_path) as process, ExitStack() as stack:
        until(lambda: time.time() - (tmp_path / LOCK_NAME).stat().st_mtime > LEASE)
        new = stack.enter_context(_held(_lock(tmp_path)))
        size = (tmp_path / "written").stat().st_size
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 144
        (line,) = stderr.splitlines()
        assert "run.lock was taken over by run 'mine'" in line
        assert (tmp_path / "written").stat().st_size == size
        new._renew()
        new.check()


def test_suspended_process_continues_if_nobody_took_over(tmp_path: Path) -> None:
    with _writer(tmp_path) as process:
        size, suspended = (tmp_path / "written").stat().st_size, time.monotonic()
        until(lambda: time.monotonic() > suspended + 2 * LEASE)
        process.send_signal(signal.SIGCONT)
        until(lambda: (tmp_path / "written").stat().st_size > size + 5)
        assert process.poll() is None


@pytest.mark.parametrize("form", ["refuses", "ignores"])
def test_store_without_conditional_writes_is_detected_and_has_one_owner(
    service_env: dict[str, str],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    capfd,
) -> None:
    """``refuses``: responds with 501; ``ignores``: overwrites regardless of the condition."""
    for name, value in service_env.items():
        monkeypatch.setenv(name, value)

    def write_if(self: Store, name: str, content: bytes, version: Version | None) -> Version:
        if form == "refuses":
            raise NotImplementedError
        self.write(name, content)
        return self.read_versioned(name)[1]

    monkeypatch.setattr(Store, "write_if", write_if)
    url, outcomes = f"{bucket}/locks/{tmp_path.name}", []

    def start() -> None:
        lock = _lock(url, 12.0)
        try:
            lock.acquire()
            outcomes.append(lock)
        except LockHeld as error:
            outcomes.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (owner,) = (outcome for outcome in outcomes if isinstance(outcome, RunLock))
    owner._renew()
    owner.check()
    owner.release()
    assert owner_of(url) is None
    assert "the storage has no conditional writes" in capfd.readouterr().err


def test_unwritable_folder_is_rejected() -> None:
    with pytest.raises(UserError, match=r"^/proc/here: cannot be created: "):
        _lock("/proc/here").acquire()
    with pytest.raises(UserError, match=rf"^/proc: {LOCK_NAME} cannot be written: "):
        _lock("/proc").acquire()


def test_file_instead_of_a_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        _lock(tmp_path / "file").acquire()


def test_renewal_succeeds_on_a_full_disk(tmp_path: Path) -> None:
    """A renewal writes no bytes."""
    with ExitStack() as stack:
        lock = stack.enter_context(_held(_lock(tmp_path)))
        before = (tmp_path / LOCK_NAME).stat()
        lock._renew()
        after = (tmp_path / LOCK_NAME).stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert after.st_mtime_ns > before.st_mtime_ns


def test_acquire_waits_for_ranks_whose_launcher_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as launcher:
        pass
    old = _lock(tmp_path)
    old.owner = dataclasses.replace(
        old.owner, launcher=dataclasses.replace(old.owner.process, pid=launcher.pid)
    )
    old.acquire()
    threading.Timer(0.3, old.release).start()
    assert 0.2 < _seconds_to_acquire(_lock(tmp_path)) < 10


def test_checkpoint_url_may_be_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    for url in (tmp_path, tmp_path / "link", tmp_path / "checkpoints"):
        locks = RunLocks()
        locks.acquire(str(tmp_path), str(url), "run")
        locks.check()
        locks.check_output()
        locks.release()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_leases_of_output_folder_and_checkpoint_url_expire_concurrently(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "out", tmp_path / "checkpoints"]
    for folder in folders:
        _abandon(_lock(folder, 1.5, host="node-b", location=str(folder.resolve())))
    locks, started = RunLocks(), time.monotonic()
    locks.acquire(*map(str, folders), "run")
    waited = time.monotonic() - started
    locks.release()
    assert 1.5 <= waited < 3.0  # sequentially it would take more than 3 s


def test_run_rejected_at_one_location_releases_the_other(tmp_path: Path) -> None:
    with _held(_lock(tmp_path / "checkpoints")):
        locks = RunLocks()
        with pytest.raises(LockHeld, match=r"use another checkpoint\.url"):
            locks.acquire(str(tmp_path / "out"), str(tmp_path / "checkpoints"), "run")
        locks.release()
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_checkpoints_are_not_changed_without_the_lock(tmp_path: Path) -> None:
    def lost() -> None:
        raise LockLost("taken over")

    checkpoints = CheckpointManager(str(tmp_path), 1)
    state = TrainingState({"weight": torch.ones(2)}, {}, 1, 1, None)
    checkpoints.save(Checkpoint(state, {}, {}, None))
    checkpoints.wait()
    before = sorted(tmp_path.rglob("*"))
    fenced = CheckpointManager(str(tmp_path), 1, lost)
    fenced.save(Checkpoint(dataclasses.replace(state, step=2), {}, {}, None))
    fenced.wait()
    with pytest.raises(LockLost):
        fenced.clear()
    assert sorted(tmp_path.rglob("*")) == before


def test_tracker_writes_nothing_without_the_lock(tmp_path: Path) -> None:
    """The server does not exist."""
    lost = threading.Event()

    def check() -> None:
        if lost.is_set():
            raise LockLost("taken over")

    spool = tmp_path / "tracking.jsonl"
    first = {
        "run_id": None,
        "experiment": "e",
        "name": "n",
        "tags": {},
        "params": {},
        "datasets": [],
    }
    tracker = MlflowTracker("http://127.0.0.1:9", spool, first, check_lock=check)
    tracker.log_metrics({"loss": 1.0}, 1)
    lost.set()
    before = spool.read_bytes()
    tracker.log_metrics({"loss": 1.0}, 2)
    assert tracker.close("FAILED") is False
    assert spool.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [spool.name]


def _run_of(folder: Path) -> Path:
    """Create the files that `convoy sync` and `convoy register` read; return the spool."""
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text("{}")
    (folder / "tracking.jsonl").write_text("{}\n")
    return folder / "tracking.jsonl"


def test_sync_and_register_reject_the_folder_of_a_live_run(tmp_path: Path) -> None:
    spool = _run_of(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    with _held(_lock(tmp_path / "run")):
        for path in (spool, tmp_path / "link" / spool.name):
            with pytest.raises(
                LockHeld, match=r"run 'mine'.*a training run delivers its entries itself"
            ):
                cli.sync(str(path))
        with pytest.raises(LockHeld, match="register the model after that process has ended"):
            cli.register(str(tmp_path / "run"), "name")
    assert {path.name for path in spool.parent.iterdir()} == {"result.json", "tracking.jsonl"}


def test_failing_commands_leave_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="there is no such file"):
        cli.sync(str(tmp_path / "missing" / "tracking.jsonl"))
    with pytest.raises(UserError, match=r"tracking\.jsonl: there is no such file"):
        cli.sync(str(tmp_path))
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        cli.sync(str(_run_of(tmp_path)))
    with pytest.raises(UserError):
        cli.register(str(tmp_path / "missing"), "name")
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "tracking.jsonl"}


def test_destination_is_packed_by_one_command_at_a_time(
    digits_folder: Path, tmp_path: Path, url: str
) -> None:
    lock = RunLock(url, "convoy pack", None, "wait", "pack.lock")
    with _held(lock), pytest.raises(LockHeld, match=r"`convoy pack`.*use another destination"):
        pack(str(digits_folder), url, PackOptions(workers=1))
    bad = tmp_path / "bad" / "class"
    bad.mkdir(parents=True)
    (bad / "image.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot be packed"):
        pack(str(bad.parent), url, PackOptions(workers=1))
    if "://" in url:
        assert open_store(url).sizes() == {}
    else:
        assert not Path(url).exists()


def test_different_parts_are_packed_concurrently_but_not_the_same_part(
    digits_folder: Path, tmp_path: Path
) -> None:
    with _held(RunLock(str(tmp_path), "convoy pack", None, "wait", "pack-1-of-2.lock")):
        with pytest.raises(LockHeld):
            pack(
                str(digits_folder), str(tmp_path), PackOptions(shards=2, workers=1, part=1, parts=2)
            )
        assert (
            pack(
                str(digits_folder), str(tmp_path), PackOptions(shards=2, workers=1, part=0, parts=2)
            )
            == []
        )


def test_demo_and_study_reject_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with _held(_lock(tmp_path)):
        with pytest.raises(LockHeld, match="use another --dir"):
            demo.demo(tmp_path, keep=False, digits=True)
        with pytest.raises(LockHeld, match="use another --dir"):
            cli.study(["depth"], folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
