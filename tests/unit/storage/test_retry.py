"""Range reads from a real S3 server with injected faults.

The correct bytes arrive, each fetched once, or there is one clear error.
"""

import configparser
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path

import boto3
import numpy as np
import obstore
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_proxy import Fault, HttpProxy, S3Server, Toxiproxy, toxiproxy_program
from support.helpers import until

from pipelines.local import servers
from trainer.data.storage.retry import RetryPolicy
from trainer.data.storage.store import Store, open_store
from trainer.errors import RetryableError, UserError

SIZE = 8 * 2**20 + 12_345
QUICK = RetryPolicy(
    tries=12,
    seconds=8,
    first_wait=0.01,
    longest_wait=0.1,
    refusals=12,
    connect_seconds=1,
    silent_seconds=0.4,
)
BRIEF = RetryPolicy(
    tries=3,
    seconds=2,
    first_wait=0.01,
    longest_wait=0.05,
    refusals=2,
    connect_seconds=1,
    silent_seconds=0.3,
)
# bytes that may be in flight when a connection breaks, in addition to an incomplete chunk
IN_FLIGHT = 64 * 1024

Open = Callable[..., Store]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("faults") / "s3")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[HttpProxy]:
    proxy = HttpProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def toxiproxy(server: S3Server) -> Iterator[Toxiproxy]:
    program = toxiproxy_program()
    if isinstance(program, str):
        pytest.skip(program)
    toxiproxy = Toxiproxy(program, server.port)
    yield toxiproxy
    toxiproxy.close()


@pytest.fixture(scope="module")
def content(server: S3Server) -> bytes:
    content = np.random.default_rng(7).bytes(SIZE)
    _put(server, "object", content)
    return content


def _put(server: S3Server, name: str, content: bytes) -> None:
    access_key, secret_key = server.credentials
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="us-east-1",
        aws_access_key_id=access_key, aws_secret_access_key=secret_key,
    )  # fmt: skip
    client.put_object(Bucket=servers.BUCKET, Key=f"x/{name}", Body=content)


@pytest.fixture
def opened(server: S3Server, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the store through the port of a proxy, with the server's credentials."""

    def opened(port: int, patience: RetryPolicy = QUICK) -> Store:
        access_key, secret_key = server.credentials
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        return open_store(f"s3://{servers.BUCKET}/x", patience=patience)

    return opened


def in_order(*faults: Fault | None) -> Callable[[], Fault | None]:
    """A plan that injects these faults into the first responses."""
    remaining = chain(faults, repeat(None))
    lock = threading.Lock()

    def plan() -> Fault | None:
        with lock:
            return next(remaining)

    return plan


def check(store: Store, content: bytes, ranges: list[tuple[int, int]]) -> None:
    parts = store.read_ranges("object", [start for start, _ in ranges], [end for _, end in ranges])
    assert [len(part) for part in parts] == [end - start for start, end in ranges]
    assert all(
        bytes(part) == content[start:end] for part, (start, end) in zip(parts, ranges, strict=True)
    )


RANGES = [
    [(0, SIZE)],
    [(5, 5), (0, 1), (SIZE - 1, SIZE)],
    [(0, 1000), (1000, 400_000), (600_000, 700_000), (700_000, 700_001), (3_000_000, 3_100_000)],
    [(500_000, 600_000), (0, 100_000), (100_000, 200_000)],
]


@pytest.mark.parametrize(
    "ranges", RANGES, ids=["full", "edges", "adjacent and separate", "out of order"]
)
def test_each_byte_is_fetched_once(
    opened: Open, proxy: HttpProxy, content: bytes, ranges: list[tuple[int, int]]
) -> None:
    store = opened(proxy.port)
    proxy.reset()
    check(store, content, ranges)
    requested = sum(end - start for start, end in ranges)
    assert proxy.bytes == requested == store.counts.bytes
    assert store.counts.retries == 0


def test_overlapping_ranges_are_fetched_once(
    opened: Open, proxy: HttpProxy, content: bytes
) -> None:
    store = opened(proxy.port)
    proxy.reset()
    check(store, content, [(1000, 5000), (0, 3000), (2000, 2500)])
    assert (proxy.bytes, proxy.gets) == (5000, 1)


def test_folder_returns_the_same_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "object").write_bytes(content)
    store = open_store(str(tmp_path), patience=BRIEF)
    for ranges in (RANGES[0], *RANGES[2:]):
        check(store, content, ranges)
    with pytest.raises(
        UserError, match=f"object: has {SIZE:,} bytes, but bytes up to {SIZE + 1:,} are needed"
    ):
        store.read_ranges("object", [0], [SIZE + 1])
    with pytest.raises(UserError, match="nothing: not found"):
        store.read_ranges("nothing", [0], [1])


FAULTS = [
    Fault("status", status=500, code="InternalError"),
    Fault("status", status=503),
    Fault("status", status=429, code="TooManyRequests"),
    Fault("status", status=400, code="RequestTimeout"),
    Fault("truncated", after=1_000_000),
    Fault("truncated", after=0),
    Fault("reset", after=2_000_000),
    Fault("reset", after=100),
    Fault("stalled", after=700_000),
    Fault("shifted"),
    Fault("ignores_range"),
]


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after}"
)
def test_read_resumes_after_a_fault(
    opened: Open, proxy: HttpProxy, content: bytes, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """A read resumes at the first missing byte: less than a chunk per fault is fetched twice."""
    store = opened(proxy.port)
    proxy.reset(in_order(fault, fault, None, fault))
    for _ in range(2):
        check(store, content, [(10, 8_000_000)])
    assert store.counts.retries == proxy.faults == 3
    assert store.counts.bytes == 2 * 7_999_990
    unread = fault.after if fault.kind == "reset" else 0  # a reset drops the kernel's buffers
    assert proxy.bytes <= 2 * 8_000_000 + 3 * (256 * 1024 + IN_FLIGHT + unread)
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == "trainer.data.storage.retry"
    ]
    assert line.startswith("s3://convoy/x/object: byte "), "one line for three retries"
    assert "; try 2 of 13 in " in line


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", status=503), "the store answered 503 SlowDown"),
        (Fault("truncated", after=0), "the response was truncated"),
        (Fault("reset"), "the connection"),
        (Fault("stalled"), "no more bytes were received"),
        (Fault("shifted"), "Requested 1000..5000, got 1001..5001"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_persistent_fault_is_an_error_after_the_last_try(
    opened: Open, proxy: HttpProxy, content: bytes, fault: Fault, message: str
) -> None:
    store = opened(proxy.port, BRIEF)
    proxy.reset(lambda: fault)
    started = time.monotonic()
    with pytest.raises(RetryableError) as error:
        store.read_ranges("object", [1000], [5000])
    assert str(error.value).startswith("s3://convoy/x/object: byte 1,000: ")
    assert message in str(error.value)
    assert "gave up after 4 tries" in str(error.value)
    assert proxy.gets == 4
    assert time.monotonic() - started < 6


def test_each_new_chunk_resets_the_tries(opened: Open, proxy: HttpProxy, content: bytes) -> None:
    """There are far more faults than the limit of tries, but a chunk arrives between any two."""
    store = opened(proxy.port, BRIEF)
    proxy.reset(lambda: Fault("truncated", after=300_000))
    check(store, content, [(0, SIZE)])
    assert store.counts.retries > 20


fault_strategy = st.one_of(
    st.none(),
    st.builds(Fault, st.just("status"), status=st.sampled_from([500, 502, 503, 504, 429])),
    st.builds(Fault, st.sampled_from(["truncated", "reset"]), after=st.integers(0, 3_000_000)),
    st.sampled_from([Fault("shifted"), Fault("ignores_range"), Fault("stalled", after=100_000)]),
)
range_strategy = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(
    lambda pair: (min(pair), max(pair))
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    faults=st.lists(fault_strategy, max_size=11),
    ranges=st.lists(range_strategy, min_size=1, max_size=4),
)
def test_any_sequence_of_faults_gives_the_correct_bytes(
    opened: Open,
    proxy: HttpProxy,
    content: bytes,
    faults: list[Fault | None],
    ranges: list[tuple[int, int]],
) -> None:
    store = opened(proxy.port)
    proxy.reset(in_order(*faults))
    check(store, content, ranges)


TOXICS = [
    ("latency", {"latency": 60, "jitter": 40}),
    ("bandwidth", {"rate": 20_000}),  # KB/s
    ("slicer", {"average_size": 50_000, "size_variation": 20_000, "delay": 10}),
]


@pytest.mark.parametrize(
    ("kind", "attributes"), TOXICS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_slow_connection_is_not_retried(
    opened: Open, toxiproxy: Toxiproxy, content: bytes, kind: str, attributes: dict[str, int]
) -> None:
    store = opened(toxiproxy.port)
    with toxiproxy.toxic(kind, **attributes):
        check(store, content, [(0, 2_000_000), (6_000_000, SIZE)])
    assert store.counts.retries == 0


def test_connection_closed_after_each_megabyte_is_resumed(
    opened: Open, toxiproxy: Toxiproxy, content: bytes
) -> None:
    store = opened(toxiproxy.port)
    with toxiproxy.toxic("limit_data", bytes=1_000_000):
        check(store, content, [(0, SIZE)])
    assert store.counts.retries >= 7
    assert store.counts.bytes == SIZE


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("reset_peer", {"timeout": 10}), ("timeout", {"timeout": 0})],
    ids=["reset", "silence"],
)
def test_silent_or_reset_connection_is_retried_within_limits(
    opened: Open, toxiproxy: Toxiproxy, content: bytes, kind: str, attributes: dict[str, int]
) -> None:
    store = opened(toxiproxy.port)
    with toxiproxy.toxic(kind, **attributes), ThreadPoolExecutor(1) as thread:
        reading = thread.submit(check, store, content, [(0, SIZE)])
        until(lambda: store.counts.retries >= 3)
        toxiproxy.cure()
        reading.result(30)
    with toxiproxy.toxic(kind, **attributes), pytest.raises(RetryableError, match="gave up after"):
        opened(toxiproxy.port, BRIEF).read_ranges("object", [0], [10])


def test_refused_connections_are_retried_within_limits(
    opened: Open, toxiproxy: Toxiproxy, content: bytes
) -> None:
    store = opened(toxiproxy.port)
    toxiproxy.switch(on=False)
    try:
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(check, store, content, [(0, SIZE)])
            until(lambda: store.counts.retries >= 4)
            toxiproxy.switch(on=True)
            reading.result(30)
        toxiproxy.switch(on=False)
        with pytest.raises(
            RetryableError, match=r"cannot be reached \(AWS_ENDPOINT_URL\); gave up after 4 tries"
        ):
            opened(toxiproxy.port, BRIEF).read_ranges("object", [0], [10])
    finally:
        toxiproxy.switch(on=True)


def test_closing_a_store_ends_its_waits(opened: Open, proxy: HttpProxy, content: bytes) -> None:
    store = opened(proxy.port, RetryPolicy(first_wait=60, longest_wait=60))
    proxy.reset(lambda: Fault("status"))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(store.read_ranges, "object", [0], [10])
        until(lambda: store.counts.retries == 1)
        store.close()
        with pytest.raises(RetryableError, match="the store was closed"):
            reading.result(10)


@pytest.mark.usefixtures("content")
def test_permanent_errors_are_not_retried(opened: Open, proxy: HttpProxy) -> None:
    store = opened(proxy.port)
    proxy.reset()
    with pytest.raises(UserError, match=r"^s3://convoy/x/nothing: byte 0: not found$"):
        store.read_ranges("nothing", [0], [10])
    with pytest.raises(
        UserError,
        match=f"^s3://convoy/x/object: byte {SIZE + 5:,}: the object ends before these bytes$",
    ):
        store.read_ranges("object", [SIZE + 5], [SIZE + 10])
    with pytest.raises(UserError, match="no such bucket"):
        open_store("s3://nobody/x", patience=QUICK).read_ranges("object", [0], [10])
    assert store.counts.retries == 0


def test_modified_object_is_an_error(opened: Open, proxy: HttpProxy, server: S3Server) -> None:
    store = opened(proxy.port)
    proxy.reset()
    _put(server, "changing", b"a" * 1000)
    assert store.read_ranges("changing", [0], [10]) == [b"a" * 10]
    _put(server, "changing", b"b" * 1000)
    with pytest.raises(
        UserError,
        match=r"changing: was changed while it was read: 1,000 bytes with ETag .* 1,000 bytes "
        r"with ETag",
    ):
        store.read_ranges("changing", [10], [20])


def test_operations_on_full_objects_are_retried(
    opened: Open, proxy: HttpProxy, content: bytes
) -> None:
    store = opened(proxy.port)
    proxy.reset(
        in_order(
            Fault("status"), Fault("truncated", after=5_000_000), Fault("reset", after=1_000_000)
        )
    )
    assert store.read_small("object") == content
    proxy.reset(in_order(Fault("status", status=500)))
    assert store.size("object") == SIZE
    assert store.read_small("nothing") is None
    assert store.size("nothing") is None
    store.write("written", b"abc")
    assert store.sizes()["written"] == 3
    store.delete(["written", "nothing"])
    assert "written" not in store.sizes()


def test_rotated_credentials_are_re_read(
    opened: Open,
    server: S3Server,
    proxy: HttpProxy,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server rejects the old key before the file has the new one.

    This happens if a mounted secret is updated late.
    """
    opened(proxy.port)  # sets the endpoint
    proxy.reset()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    _write_credentials(path, *server.credentials)
    patience = RetryPolicy(
        tries=100, seconds=30, first_wait=0.05, longest_wait=0.2, refusals=300, silent_seconds=2
    )
    store = open_store(f"s3://{servers.BUCKET}/x", patience=patience)
    check(store, content, [(0, 1000)])
    server.rotate()
    with ThreadPoolExecutor(1) as thread:
        before = store.counts.retries
        reading = thread.submit(check, store, content, [(0, SIZE)])
        until(lambda: store.counts.retries > before + 2)
        _write_credentials(path, *server.credentials)
        reading.result(30)
    assert store.size("object") == SIZE
    _write_credentials(path, "old", "wrong")
    with pytest.raises(UserError, match="permission denied; check the credentials"):
        open_store(f"s3://{servers.BUCKET}/x", patience=patience).read_ranges("object", [0], [10])


def test_expired_credentials_are_an_error_after_the_last_try(
    opened: Open, server: S3Server, proxy: HttpProxy, content: bytes
) -> None:
    store = opened(proxy.port, BRIEF)
    proxy.reset()
    check(store, content, [(0, 1000)])
    proxy.reset(lambda: Fault("status", status=400, code="ExpiredToken"))
    with pytest.raises(
        RetryableError,
        match=r"the credentials have expired; get new ones .* gave up after 3 tries",
    ):
        store.read_ranges("object", [0], [10])


def _write_credentials(path: Path, access_key: str, secret_key: str) -> None:
    file = configparser.RawConfigParser()
    file["default"] = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
    part = path.with_suffix(".part")
    with part.open("w") as opened_part:
        file.write(opened_part)
    part.replace(path)


def test_read_resumes_after_a_server_restart(
    opened: Open,
    server: S3Server,
    proxy: HttpProxy,
    content: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server is killed during a read; the proxy holds the response back until then."""
    caplog.set_level(logging.WARNING)
    store = opened(
        proxy.port, RetryPolicy(tries=1000, first_wait=0.05, longest_wait=0.3, silent_seconds=20)
    )
    proxy.reset(in_order(Fault("stalled", after=3_000_000)))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(check, store, content, [(0, 8_000_000)])
        until(lambda: store.counts.bytes > 2_000_000)
        server.kill()
        proxy.released.set()
        until(lambda: store.counts.retries >= 3)
        proxy.released.clear()
        server.start()
        reading.result(60)
    assert store.counts.bytes == 8_000_000
    assert caplog.records


def test_reference_object_has_the_uploaded_content(server: S3Server, content: bytes) -> None:
    access_key, secret_key = server.credentials
    direct = obstore.store.S3Store(
        servers.BUCKET,
        endpoint=f"http://127.0.0.1:{server.port}",
        access_key_id=access_key,
        secret_access_key=secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    assert obstore.get(direct, "x/object").bytes() == content
