"""A storage URL denotes exactly one location or is rejected."""

import os
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.local import servers
from trainer.data.storage.location import Location, is_remote, parse_storage_url
from trainer.data.storage.store import open_store
from trainer.errors import UserError

LITERAL = [
    "run#1",
    "run#2",
    "run",
    "run?v=1",
    "a%20b",
    "a b",
    "a%2Fb",
    "100%",
    "é",
    "e\u0301",
    "日本",
    "a+b",
    "a&b=c",
]
LITERAL += ["[1]{2}", "~x", "a:b@c", "a;b,c'd"]


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_prefix_is_literal(scheme: str) -> None:
    for prefix in LITERAL:
        assert parse_storage_url(f"{scheme}://bucket/{prefix}/x") == Location(
            scheme, "bucket", f"{prefix}/x"
        )
        assert parse_storage_url(f"{scheme}://bucket/{prefix}").url == f"{scheme}://bucket/{prefix}"


def test_spellings_of_a_location_are_equal() -> None:
    same = {parse_storage_url(url) for url in ("s3://b/run", "s3://b/run/", "S3://b/run")}
    assert same == {Location("s3", "b", "run")}
    assert {parse_storage_url(url) for url in ("s3://b", "s3://b/")} == {Location("s3", "b", "")}
    assert parse_storage_url("s3://B/run") != parse_storage_url("s3://b/run")


def test_paths_and_file_urls_denote_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = str(tmp_path / "a#b?c %41")
    for url in (here, "a#b?c %41", "./a#b?c %41", f"{tmp_path}//a#b?c %41/"):
        assert parse_storage_url(url) == Location("file", "", here)
    for url in (
        f"file://{tmp_path}/run#1",
        f"FILE://{tmp_path}/run#1",
        f"file://localhost{tmp_path}/run#1",
    ):
        assert parse_storage_url(url).prefix == str(tmp_path / "run#1")
    assert parse_storage_url("~/data").prefix == str(tmp_path / "home" / "data")
    assert parse_storage_url("./~/data").prefix == str(tmp_path / "~" / "data")
    assert parse_storage_url("v1:data/train").prefix == str(tmp_path / "v1:data" / "train")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert parse_storage_url("link").contains(parse_storage_url(f"{tmp_path}/x/../real"))
    assert parse_storage_url(f"/{tmp_path}/real").contains(parse_storage_url("link/below"))
    assert not parse_storage_url("link").contains(parse_storage_url("other"))
    assert not parse_storage_url("link").contains(parse_storage_url("real2"))
    assert parse_storage_url("/").contains(parse_storage_url("link"))


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("s3://b/run1", "S3://b/run1/", True),
        ("s3://b/run1", "s3://b/run1/x", True),
        ("s3://b", "s3://b/x", True),
        ("s3://b/run1", "s3://b/run10", False),
        ("s3://b/run1/x", "s3://b/run1", False),
        ("s3://b/x", "gs://b/x", False),
        ("s3://b/x", "/b/x", False),
    ],
)
def test_contains_is_true_for_equal_and_nested_locations(
    outer: str, inner: str, expected: bool
) -> None:
    assert parse_storage_url(outer).contains(parse_storage_url(inner)) is expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("s3://", "names no bucket"),
        ("s3:///run", "names no bucket"),
        ("s3://b//run", "empty segment"),
        ("s3://b/run//x", "empty segment"),
        ("s3://b/run//", "empty segment"),
        ("s3://b/./run", ". and .."),
        ("s3://b/run/..", ". and .."),
        ("s3://../run", "not a bucket name"),
        ("s3://b_/a\\b", "separate with /"),
        ("s3://-b/run", "not a bucket name"),
        ("s3://b%20c/run", "not a bucket name"),
        ("s3://b#1/run", "not a bucket name"),
        ("s3://b?x/run", "not a bucket name"),
        ("s3://büro/run", "not a bucket name"),
        ("s3://10.0.0.1/b/run", "not a bucket name"),
        ("s3://minio:9000/b/run", "set AWS_ENDPOINT_URL to http://minio:9000"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/ap", "not a bucket name"),
        ("s3://b/" + "é" * 600, "longer than the 1024 bytes"),
        ("s3:/b/run", "two slashes"),
        ("s3:b/run", "two slashes"),
        ("gs:/b/run", "two slashes"),
        ("file:/data", "two slashes"),
        ("file:data", "two slashes"),
        ("https:/b", "two slashes"),
        ("s3a://b/run", "write s3://BUCKET/PREFIX"),
        ("s3n://b/run", "write s3://BUCKET/PREFIX"),
        ("gcs://b/run", "write gs://BUCKET/PREFIX"),
        ("azure://c/run", "write az://CONTAINER/PREFIX"),
        ("abfs://c@account.dfs.core.windows.net/run", "write az://CONTAINER/PREFIX"),
        ("abfss://c/run", "write az://CONTAINER/PREFIX"),
        ("hf://datasets/x", "hf:// is not supported"),
        ("ftp://b/run", "ftp:// is not supported"),
        ("https://b.s3.eu-west-1.amazonaws.com/run/1", "write s3://b/run/1"),
        ("https://s3.amazonaws.com/b/run", "write s3://b/run"),
        ("http://localhost:9000/b/run", "set AWS_ENDPOINT_URL"),
        ("file://host/data", "three slashes"),
        ("file://~/data", "three slashes"),
        ("file://data", "three slashes"),
        ("file://", "three slashes"),
        ("file:///a%20b", "ambiguous"),
        ("C:\\data", "Windows"),
        ("C:/data", "Windows"),
        ("\\\\server\\share", "Windows"),
        ("~nobody-of-this-name/data", "no such user"),
        (" s3://b/run", "remove the space"),
        ("s3://b/run ", "remove the space"),
        ("s3://b/run\n", "control character"),
        ("s3://b/run\r", "control character"),
        ("s3://b/a\tb", "control character"),
        ("/data/a\nb", "control character"),
        ("/data/\udcff", "control character"),
        ("/data/\0", "control character"),
    ],
)
def test_ambiguous_url_is_a_one_line_error(url: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_storage_url(url)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA7:hidden@b/run",
        "s3://AKIA7:hid/hidden+x@b/run",
        "s3://AKIA7:hidden",
        "s3://AKIA7:hidden/run",
        "s3://b/run?X-Amz-Signature=hidden",
        "az://c/run?sig=hidden&se=2027",
        "s3://b/run?x=1&secret_key=hidden",
        "s3:AKIA7:hidden@b/run",
        "s3a://AKIA7:hidden@b/run",
        "https://me:hidden@b.s3.amazonaws.com/run",
    ],
)
def test_credentials_in_a_url_are_rejected_and_not_shown(url: str) -> None:
    with pytest.raises(UserError) as error:
        parse_storage_url(url)
    assert "hidden" not in str(error.value)


urls = st.builds(
    "{}{}{}".format,
    st.sampled_from(
        [
            "s3://",
            "S3://",
            "gs://",
            "az://",
            "file://",
            "file:///",
            "/",
            "./",
            "~/",
            "s3:/",
            "https://",
            "",
        ]
    ),
    st.text(st.sampled_from("ab.-_~:@/\\#?%2F +é\u0301日\x00\x7f\udcff$&="), max_size=12),
    st.sampled_from(["", "/", "//", "/x", "/.", "/..", " "]),
)


@settings(max_examples=200, deadline=None)
@given(urls, urls)
@example("s3://b/run#1", "s3://b/run#2")
@example("s3://b/a%20b", "s3://b/a b")
def test_different_urls_denote_different_locations(first: str, second: str) -> None:
    """Exceptions are documented: case of the scheme, a trailing slash, and spellings of folders."""
    found = []
    for url in (first, second):
        try:
            location = parse_storage_url(url)
        except UserError:
            return
        assert parse_storage_url(location.url) == location, "round trip"
        assert location.is_remote == is_remote(url)
        found.append(location)
    if found[0] == found[1] and found[0].is_remote:
        spelled = [(url[:2].lower() + url[2:]).removesuffix("/") for url in (first, second)]
        assert spelled[0] == spelled[1]


@pytest.mark.parametrize("name", ["run#1", "run?v=1", "a%20b", "a b", "é+&=;'日本"])
def test_object_store_uses_the_literal_key_of_the_url(
    services: servers.Services, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable, value in services.environment().items():
        monkeypatch.setenv(variable, value)
    store = open_store(f"s3://{servers.BUCKET}/literal/{name}")
    store.write("x y#%41.tar", b"abc")
    client = boto3.client(
        "s3", endpoint_url=services.s3_url, region_name="us-east-1",
        aws_access_key_id=services.access_key, aws_secret_access_key=services.secret_key,
    )  # fmt: skip
    key = f"literal/{name}/x y#%41.tar"
    assert client.get_object(Bucket=servers.BUCKET, Key=key)["Body"].read() == b"abc"
    client.put_object(Bucket=servers.BUCKET, Key=f"literal/{name}2/x", Body=b"another run")
    client.put_object(
        Bucket=servers.BUCKET, Key=f"literal/{quote(name)}-other/x", Body=b"another run"
    )
    assert store.sizes() == {"x y#%41.tar": 3}
    assert bytes(store.read_ranges("x y#%41.tar", [1], [3])[0]) == b"bc"
    store.delete(["x y#%41.tar"])
    assert store.sizes() == {}
    assert (
        client.get_object(Bucket=servers.BUCKET, Key=f"literal/{name}2/x")["Body"].read()
        == b"another run"
    )


@pytest.mark.parametrize("name", ["run#1", "a%20b", "a?b", "日本"])
def test_folder_store_uses_the_literal_path(tmp_path: Path, name: str) -> None:
    store = open_store(f"{tmp_path}/{name}", create=True)
    store.write("x#%41.tar", b"abc")
    assert (tmp_path / name / "x#%41.tar").read_bytes() == b"abc"
    assert os.listdir(tmp_path) == [name]
    assert store.sizes() == {"x#%41.tar": 3}
