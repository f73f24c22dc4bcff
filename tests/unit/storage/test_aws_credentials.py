"""S3 settings have the same precedence as in the AWS tools, and never make the client panic."""

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import BaseError
from obstore.store import S3Store
from support.s3_responses import MemoryS3, constant, serving

from trainer.data.storage.aws_credentials import bucket_endpoint, parse_endpoint, s3_settings
from trainer.data.storage.retry import RetryPolicy
from trainer.data.storage.store import open_store
from trainer.errors import UserError

BRIEF = RetryPolicy(
    tries=2,
    seconds=1,
    first_wait=0.01,
    longest_wait=0.05,
    refusals=1,
    connect_seconds=1,
    silent_seconds=1,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder and an environment without AWS variables."""
    for name in [*os.environ]:
        if name.startswith("AWS_") or name in (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    return tmp_path


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def s3() -> Iterator[tuple[MemoryS3, str]]:
    store = MemoryS3()
    with serving(store) as url:
        yield store, url


def _config(home: Path, text: str, credentials: str = "") -> None:
    (home / ".aws/config").write_text(text)
    if credentials:
        (home / ".aws/credentials").write_text(credentials)


def _authorization(s3: MemoryS3) -> str:
    """Send a request; return its Authorization header, which holds key, date and region."""
    open_store("s3://b/run", patience=BRIEF).read_small("x")
    return s3.requests[-1][2]["authorization"]


PROFILES = """
[default]
region = eu-west-1
endpoint_url = {url}/default
[profile lab]
region = eu-west-3
services = local
[services local]
s3 =
  endpoint_url = {url}/lab
  addressing_style = path
dynamodb =
  endpoint_url = http://127.0.0.1:1
"""
CREDENTIALS = """[default]
aws_access_key_id=DEFAULTKEY
aws_secret_access_key=a
[lab]
aws_access_key_id=LABKEY
aws_secret_access_key=b
"""


@pytest.mark.parametrize(
    ("variables", "key", "region", "path"),
    [
        ({}, "DEFAULTKEY", "eu-west-1", "default/b"),
        ({"AWS_PROFILE": "lab"}, "LABKEY", "eu-west-3", "lab/b"),
        ({"AWS_DEFAULT_PROFILE": "lab"}, "LABKEY", "eu-west-3", "lab/b"),
        ({"AWS_PROFILE": "", "AWS_REGION": " "}, "DEFAULTKEY", "eu-west-1", "default/b"),
        (
            {"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "us-west-1"},
            "DEFAULTKEY",
            "us-west-2",
            "default/b",
        ),
        ({"AWS_DEFAULT_REGION": "us-west-1"}, "DEFAULTKEY", "us-west-1", "default/b"),
        ({"AWS_ENDPOINT_URL": "{url}/all"}, "DEFAULTKEY", "eu-west-1", "all/b"),
        (
            {"AWS_ENDPOINT_URL": "{url}/all", "AWS_ENDPOINT_URL_S3": "{url}/s3/"},
            "DEFAULTKEY",
            "eu-west-1",
            "s3/b",
        ),
        (
            {"AWS_ENDPOINT_URL": "{url}/all", "AWS_ENDPOINT_URL_S3": ""},
            "DEFAULTKEY",
            "eu-west-1",
            "all/b",
        ),
        ({"AWS_ENDPOINT_URL": "", "AWS_PROFILE": "lab"}, "LABKEY", "eu-west-3", "lab/b"),
        (
            {"AWS_ACCESS_KEY_ID": "ENVKEY", "AWS_SECRET_ACCESS_KEY": "s", "AWS_PROFILE": "lab"},
            "ENVKEY",
            "eu-west-3",
            "lab/b",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "DEFAULTKEY",
            "eu-west-1",
            "default/b",
        ),
        (
            {"AWS_BUCKET": "other", "AWS_BUCKET_NAME": "other"},
            "DEFAULTKEY",
            "eu-west-1",
            "default/b",
        ),
    ],
)
def test_settings_have_the_precedence_of_the_aws_tools(
    home: Path,
    s3: tuple[MemoryS3, str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    key: str,
    region: str,
    path: str,
) -> None:
    _config(home, PROFILES.replace("{url}", s3[1]), CREDENTIALS)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("{url}", s3[1]))
    header = _authorization(s3[0])
    assert f"Credential={key}/" in header
    assert f"/{region}/s3/" in header
    assert s3[0].requests[-1][1] == f"{path}/run/x"


def test_configured_file_paths_and_credential_process_are_used(
    home: Path, s3: tuple[MemoryS3, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        'print(\'{"Version": 1, "AccessKeyId": "PROGRAMKEY", "SecretAccessKey": "s"}\')'
    )
    (tmp_path / "config").write_text(
        f"[default]\nendpoint_url={s3[1]}\ncredential_process={sys.executable} {program}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert "Credential=PROGRAMKEY/" in _authorization(s3[0])
    (tmp_path / "credentials").write_text(CREDENTIALS)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert "Credential=DEFAULTKEY/" in _authorization(s3[0])


def test_credentials_are_read_from_the_config_file(home: Path, s3: tuple[MemoryS3, str]) -> None:
    _config(
        home,
        f"[default]\nendpoint_url={s3[1]}\naws_access_key_id=CONFIGKEY\naws_secret_access_key=s\n",
    )
    assert "Credential=CONFIGKEY/" in _authorization(s3[0])


def test_configured_endpoints_can_be_ignored(
    home: Path, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _config(home, "[default]\nregion=eu-west-1\nendpoint_url=http://127.0.0.1:1\n")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert s3_settings().endpoint is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert s3_settings().endpoint == "https://s3.eu-west-1.amazonaws.com"


def test_virtual_hosting_adds_the_bucket_to_the_host_name(
    home: Path, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _config(
        home,
        "[default]\ns3 =\n  addressing_style = virtual\nendpoint_url = https://store.example:9000/\n",
    )
    found = s3_settings()
    assert found.virtual_hosted
    assert bucket_endpoint(found, "b") == "https://b.store.example:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://b.store.example")
    assert bucket_endpoint(s3_settings(), "b") == "https://b.store.example"


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        ({"AWS_PROFILE": "nobody"}, "", "nobody"),
        (
            {},
            "[default]\nservices = local\n",
            "services 'local', which the config file does not define",
        ),
        ({}, "[default\nregion=x", "config"),
        ({"AWS_REGION": "us east\t1"}, "", "is not a region"),
        ({"AWS_ENDPOINT_URL": "ftp://x"}, "", "AWS_ENDPOINT_URL: 'ftp://x' is not an endpoint"),
        ({"AWS_ENDPOINT_URL": "http://"}, "", "needs a host"),
        (
            {},
            "[default]\nendpoint_url = http://x:99999\n",
            "endpoint_url of profile default: 'http://x:99999'",
        ),
        ({"AWS_CA_BUNDLE": "/no/such.pem"}, "", "AWS_CA_BUNDLE: /no/such.pem: No such file"),
        ({"AWS_CA_BUNDLE": "/"}, "", "AWS_CA_BUNDLE: /: Is a directory"),
        ({"AWS_CA_BUNDLE": __file__}, "", "holds no CA certificate in PEM form"),
        ({}, "[default]\nca_bundle = ~/missing.pem\n", "missing.pem: No such file"),
        ({"AWS_ACCESS_KEY_ID": "ENVKEY\n"}, "", "AWS_ACCESS_KEY_ID: holds a space, a newline"),
        (
            {"AWS_SECRET_ACCESS_KEY": "hidden\n"},
            "",
            "AWS_SECRET_ACCESS_KEY: holds a space, a newline",
        ),
        ({"AWS_SESSION_TOKEN": "hidden\r"}, "", "AWS_SESSION_TOKEN: holds a space, a newline"),
        ({"AWS_SKIP_SIGNATURE": "maybe"}, "", "maybe"),
        (
            {"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:9"},
            "",
            "AWS_ENDPOINT_URL: credentials do not belong in an endpoint",
        ),
        (
            {"AWS_ENDPOINT_URL": "me:hidden@127.0.0.1:9"},
            "",
            "AWS_ENDPOINT_URL: credentials do not belong in an endpoint",
        ),
    ],
)
def test_invalid_setting_is_a_one_line_error(
    home: Path,
    keys: None,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    config: str,
    message: str,
) -> None:
    _config(home, config)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        open_store("s3://b/run")
    assert message in str(error.value)
    assert "hidden" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("localhost:9000", "http://localhost:9000"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("minio.localhost", "http://minio.localhost"),
        ("minio:9000", "https://minio:9000"),
        ("s3.example.com", "https://s3.example.com"),
        (" http://minio:9000/ ", "http://minio:9000"),
        ("HTTP://minio:9000//", "http://minio:9000"),
        ("https://example.com/s3/v1/", "https://example.com/s3/v1"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_endpoint_scheme_and_slash_are_normalized(text: str, endpoint: str) -> None:
    assert parse_endpoint(text, "AWS_ENDPOINT_URL") == endpoint


@pytest.mark.parametrize(
    "text",
    ["http://", "://x", "http://x:0", "http://x:", "http://x:port", "http://a b", "http://x?y=1",
     "http://x#y", "::1:9000", "http://[::1", "http://x/\u00e9", "http://x\\y", "http:///path",
     "s3://b", "http:x", "/", "http://x{y}", "http://xn--a", "http://256.1.1.1", "http://[1]",
     "http://%41", "http://a/../b"],
)  # fmt: skip
def test_invalid_endpoint_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"^VARIABLE: .*endpoint"):
        parse_endpoint(text, "VARIABLE")


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ahtps:/.@[]1%9 #?\\é\x00-_{"), max_size=14))
def test_accepted_endpoints_never_make_the_client_panic(text: str) -> None:
    try:
        endpoint = parse_endpoint(text, "VARIABLE")
    except UserError:
        return
    store = S3Store(
        "b",
        prefix="run",
        region="us-east-1",
        endpoint=endpoint,
        aws_endpoint_url_s3=endpoint,
        skip_signature=False,
        access_key_id="k",
        secret_access_key="s",
        client_options={
            "allow_http": True,
            "timeout": "1ms",
            "proxy_url": "http://127.0.0.1:1",
        },
        retry_config={"max_retries": 0},
    )
    with pytest.raises((BaseError, OSError)):
        obstore.head(store, "x")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_loopback_endpoint_without_a_scheme_works(
    s3: tuple[MemoryS3, str], keys: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, s3[1].removeprefix("http://"))
    assert "/us-east-1/s3/" in _authorization(s3[0])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, and ``server.pem`` with ``server.key``, signed by this CA for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-days",
        "9",
        "-subj",
        "/CN=test CA",
    )
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=store")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    signing = (
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "9",
        "-extfile",
        "names",
    )
    openssl("x509", "-req", "-in", "server.csr", "-out", "server.pem", *signing)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "AWS_CA_BUNDLE",
        "ca_bundle",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "all public CAs and the test CA",
    ],
)
def test_private_ca_bundle_is_used(
    home: Path, keys: None, certificates: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bundle = certificates / "ca.pem"
    if how == "ca_bundle":
        _config(home, f"[default]\nca_bundle = {bundle}\n")
    elif how.startswith("all"):
        public = Path(ssl.get_default_verify_paths().openssl_cafile)
        both = home / "both.pem"
        both.write_bytes((public.read_bytes() if public.is_file() else b"") + bundle.read_bytes())
        monkeypatch.setenv("AWS_CA_BUNDLE", str(both))
    else:
        monkeypatch.setenv(how, str(bundle))
    store = MemoryS3()
    with serving(store, (certificates / "server.pem", certificates / "server.key")) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "/us-east-1/s3/" in _authorization(store)


def test_rejected_certificate_is_an_error_with_the_reason(
    keys: None, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = (certificates / "server.pem", certificates / "server.key")
    monkeypatch.setattr("trainer.data.storage.client._QUIET_RETRIES", {"max_retries": 0})
    with serving(constant(200), pair) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            UserError, match=r"certificate of the object store at https://.*set AWS_CA_BUNDLE"
        ):
            _authorization(MemoryS3())
    with serving(constant(200), pair, host="localhost") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates / "ca.pem"))
        with pytest.raises(
            UserError,
            match=r"certificate of the object store at https://localhost.* is for another host "
            r"name",
        ):
            _authorization(MemoryS3())
    with serving(constant(200), (certificates / "ca.pem", certificates / "ca.key")) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match="is a CA's own certificate"):
            _authorization(MemoryS3())
    with serving(constant(200)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url.replace("http", "https"))
        with pytest.raises(UserError, match="does not speak TLS"):
            _authorization(MemoryS3())
