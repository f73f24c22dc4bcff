"""Unexpected responses of a server: the result is correct or a one-line error.

There is no panic, no traceback and no silent success.
"""

from pathlib import Path

import pytest
from support.s3_responses import FULL, PAGE, MemoryS3, constant, s3_error, serving

from pipelines.datasets.pack import PackOptions, pack
from trainer.data.index import open_index
from trainer.data.storage.retry import RetryPolicy
from trainer.data.storage.store import open_store, parse_record
from trainer.errors import RetryableError, UserError

BRIEF = RetryPolicy(
    tries=2,
    seconds=1,
    first_wait=0.01,
    longest_wait=0.05,
    refusals=1,
    connect_seconds=1,
    silent_seconds=1,
)
LISTING = (
    b"<ListBucketResult><Name>b</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>"
    b"<Contents><Key>%s</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
    b"<Size>3</Size></Contents></ListBucketResult>"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setattr("trainer.data.storage.client._QUIET_RETRIES", {"max_retries": 0})


RESPONSES = {
    "web page": (constant(200, PAGE), "not answer as an object store"),
    "web page with an ETag": (
        constant(200, PAGE, **{k.replace("-", "_"): v for k, v in FULL.items()}),
        "not answer as an object store",
    ),
    "nothing": (constant(204), "not answer as an object store"),
    "a large page": (constant(200, PAGE + b"x" * 5_000_000), "not answer as an object store"),
    "a page for a missing object": (constant(404, PAGE), "a web page"),
    "truncated XML": (constant(200, (LISTING % b"run/a")[:-40]), "not answer as an object store"),
    "bytes that are not UTF-8": (
        constant(200, LISTING % b"run/\xff"),
        "not answer as an object store",
    ),
    "a wrong date": (
        constant(200, PAGE, ETag="x", Last_Modified="yesterday"),
        "not answer as an object store",
    ),
    "a redirect": (constant(301, s3_error("PermanentRedirect")), "another region (AWS_REGION)"),
    "another region": (
        constant(400, s3_error("AuthorizationHeaderMalformed", "<Region>eu-west-9</Region>")),
        "AWS_REGION=eu-west-9",
    ),
    "an expired token": (constant(400, s3_error("ExpiredToken")), "the credentials have expired"),
    "a wrong clock": (constant(403, s3_error("RequestTimeTooSkewed")), "the clock of this machine"),
    "no permission": (constant(403, s3_error("AccessDenied")), "permission denied"),
    "no bucket": (constant(404, s3_error("NoSuchBucket")), "there is no such bucket"),
    "a TLS port": (
        constant(400, b"Client sent an HTTP request to an HTTPS server.\n"),
        "write https:// in AWS_ENDPOINT_URL",
    ),
    "a method that is not allowed": (constant(405), "check that AWS_ENDPOINT_URL"),
}


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("command", ["list", "write", "read"])
def test_unexpected_response_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, response: str, command: str
) -> None:
    handler, message = RESPONSES[response]
    with serving(handler) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_store("s3://b/run", patience=BRIEF)
        work = {
            "list": store.sizes,
            "write": lambda: store.write("x", b"content"),
            "read": lambda: store.read_record("x.json"),
        }
        with pytest.raises(UserError) as error:
            work[command]()
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert "s3://b/run" in line
    if command == "list":
        assert message in line


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, ""), (500, "InternalError")])
def test_busy_store_is_retried_within_limits(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    with serving(constant(status, s3_error(code) if code else b"")) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(RetryableError, match=str(status)):
            open_store("s3://b/run", patience=BRIEF).sizes()


def test_redirect_to_a_web_page_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(constant(200, PAGE)) as page,
        serving(constant(302, b"", Location=f"{page}/login")) as url,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match="does not answer as an object store"):
            open_store("s3://b/run", patience=BRIEF).sizes()


def test_listing_has_the_keys_below_the_prefix_without_folder_markers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3 = MemoryS3()
    s3.objects = {
        f"b/{key}": b"x"
        for key in ("run", "run/", "run/a", "run/b/c", "run2/a", "run#1/a", "ru", "other")
    }
    with serving(s3) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert sorted(open_store("s3://b/run", patience=BRIEF).sizes()) == ["a", "b/c"]
        assert sorted(open_store("s3://b/run#1", patience=BRIEF).sizes()) == ["a"]


@pytest.mark.parametrize("key", ["run/a//b", "run/../b", "run/a&#9;b"])
def test_unusable_key_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with serving(constant(200, LISTING % key.encode())) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            UserError, match="s3://b/run: holds an object whose key cannot be used"
        ) as error:
            open_store("s3://b/run", patience=BRIEF).sizes()
    assert len(str(error.value).splitlines()) == 1


def test_write_to_a_web_page_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client takes a response of 200 with an ETag to a PUT for success."""
    requests = []

    def page(request: object, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        requests.append(request.command)  # type: ignore[attr-defined]
        return 200, PAGE, FULL

    with serving(page) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError):
            open_store("s3://b/run", patience=BRIEF).write("x", b"content")
    assert "PUT" not in requests


def test_write_needs_only_write_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_only(request: object, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        return (200, b"", FULL) if request.command == "PUT" else (403, s3_error("AccessDenied"), {})  # type: ignore[attr-defined]

    with serving(write_only) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        open_store("s3://b/run", patience=BRIEF).write("x", b"content")


@pytest.mark.parametrize(
    "content",
    [
        PAGE,
        b"",
        b"\xff\xfe",
        b"{",
        b"[1, 2]",
        b"null",
        b"12",
        b'"x"',
        b"{" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b"\0",
    ],
)
def test_record_that_is_not_a_json_object_is_a_one_line_error(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^s3://b/x\.json: ") as error:
        parse_record(content, "s3://b/x.json")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", [PAGE, b"", b"{"])
def test_index_or_plan_that_is_not_json_is_an_error(
    tmp_path: Path, jpeg_folder: Path, content: bytes
) -> None:
    (tmp_path / "train/.pack").mkdir(parents=True)
    (tmp_path / "train/index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json: is "):
        open_index(str(tmp_path / "train"))
    (tmp_path / "train/index.json").unlink()
    (tmp_path / "train/.pack/plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"plan\.json: is "):
        pack(str(jpeg_folder), str(tmp_path), PackOptions(workers=1))


def test_panic_of_the_client_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are validated, so none is known to cause a panic; this test skips the validation."""
    monkeypatch.setattr(
        "trainer.data.storage.aws_credentials.parse_endpoint", lambda text, source: text
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9")
    with pytest.raises(UserError, match=r"s3://b/run.*the storage client failed"):
        open_store("s3://b/run", patience=BRIEF).sizes()
