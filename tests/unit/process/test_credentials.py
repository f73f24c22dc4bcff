"""Credentials are removed from URLs and configurations, and redacted in texts of libraries."""

import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.helpers import RunText

from pipelines.cluster.job_spec import JobOptions, render
from trainer.config.schema import load_config
from trainer.errors import UserError, report
from trainer.secrets.credentials import take_credentials, without_credentials
from trainer.secrets.redaction import redact, redact_credentials

TAKEN = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "PGUSER",
    "PGPASSWORD",
    "CONVOY_CREDENTIALS_HOST",
)
URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
RECIPE = "model: {name: resnet8}\ndata: {train: /data}\ntrain: {epochs: 1}\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TAKEN, *URIS):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("uri", "clean", "user", "password"),
    [
        ("http://me:hunter2@host:5000/x", "http://host:5000/x", "me", "hunter2"),
        ("https://me:p%40ss%2Fw%3A%25@host", "https://host", "me", "p@ss/w:%"),
        ("http://me:p@ss@host", "http://host", "me", "p@ss"),
        ("HTTPS://m%20e:%C3%A9@[::1]:5000", "HTTPS://[::1]:5000", "m e", "é"),
        ("http://:hunter2@host", "http://host", "", "hunter2"),
        (" http://me:hunter2@host ", "http://host", "me", "hunter2"),
    ],
)
@pytest.mark.parametrize("source", ["override", "quoted override", "recipe", "MLFLOW_TRACKING_URI"])
def test_mlflow_credentials_are_moved_to_the_environment(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    uri: str,
    clean: str,
    user: str,
    password: str,
) -> None:
    overrides = []
    if source == "recipe":
        recipe.write_text(RECIPE + yaml.safe_dump({"tracking": {"uri": uri}}))
    elif source == "MLFLOW_TRACKING_URI":
        monkeypatch.setenv(source, uri)
    else:
        overrides = [f"tracking.uri={uri}" if source == "override" else f"tracking.uri='{uri}'"]
    overrides = take_credentials(overrides)
    config = load_config(str(recipe), overrides)
    assert (config.tracking.uri or os.environ["MLFLOW_TRACKING_URI"]) == clean
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == user
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password
    assert password not in repr((config, overrides, [os.environ.get(name) for name in URIS]))
    assert take_credentials(overrides) == overrides


def test_postgresql_password_is_moved_to_pgpassword() -> None:
    assert take_credentials(["tracking.uri=postgresql+psycopg2://me:p%40w@host/db"]) == [
        "tracking.uri=postgresql+psycopg2://host/db"
    ]
    assert (os.environ["PGUSER"], os.environ["PGPASSWORD"]) == ("me", "p@w")
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////data/a@b/x.db",
        "databricks://profile",
        "file:///a:b@c",
        "/runs/a@b",
        "mysql://root@host/x",
    ],
)
def test_uri_without_a_password_is_unchanged(uri: str) -> None:
    assert take_credentials([f"tracking.uri={uri}"]) == [f"tracking.uri={uri}"]
    assert not {*TAKEN} & {*os.environ}


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=mysql://me:hunter2@host/db",
        "tracking.uri=http://me:hunter2/x@host",
        "tracking.uri=http://me:hun#hunter2@host",
        "tracking.uri=http://host/?token=hunter2",
        "tracking.uri=http://host/?pass=hunter2",
        "tracking.uri=http://host/#token=hunter2",
        "tracking.uri=http://me:123/hunter2@host",  # me:123 could be a host and its port
        "tracking.uri=http:/me:hunter2@host",
        "tracking.uri=http//me:hunter2@host",
        "tracking.uri=//me:hunter2@host",
        "tracking.uri=me:hunter2@host:5000",
        "data.train=s3://key:hunter2@bucket/x",
        "data.val=https://b.s3.amazonaws.com/x?X-Amz-Signature=hunter2",
        "checkpoint.url=az://c/x?sv=1&sig=hunter2",
        "model.init=s3://key:hun/hunter2@bucket/x.pth",
    ],
)
def test_other_credentials_are_rejected_and_not_echoed(recipe: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}: ") as error:
        take_credentials([override])
    assert "hunter2" not in str(error.value)
    values = yaml.safe_load(RECIPE)
    section, _, leaf = key.partition(".")
    values.setdefault(section, {})[leaf] = override.partition("=")[2]
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{key}: ") as error:
        load_config(str(recipe))
    assert "hunter2" not in str(error.value)


def test_credentials_are_not_sent_to_another_server(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@ours:5000")
    take_credentials()
    load_config(str(recipe), ["tracking.uri=http://ours:5000/"])
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
    load_config(str(recipe), ["tracking.uri=http://theirs"])
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "given")
    load_config(str(recipe), ["tracking.uri=http://theirs"])
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "given"


@pytest.mark.parametrize(
    "text",
    [
        "tracking: {uri: http://me:hunter2@host}  # http://me:hunter2@old",
        'tracking:\n  uri: "http://me:hunter\\x32@host"',
        'tracking:\n  uri: "http:\\x2f/me:hunter2@host"',
        'tracking:\n  uri: "http://me:hun\\\n    ter2@host"',
    ],
)
def test_recorded_recipe_has_no_credentials(text: str) -> None:
    recorded = without_credentials(RECIPE + text)
    assert "hunter" not in recorded
    assert yaml.safe_load(recorded)["tracking"]["uri"] in ("http://host", "http://***@host")
    assert without_credentials(RECIPE + "# a comment\n") == RECIPE + "# a comment\n"


@pytest.mark.parametrize(
    ("override", "comment"),
    [("tracking.uri=http://me:hunter2@host", ""), ("", "# http://me:hunter2@host\n")],
)
def test_manifest_with_credentials_is_rejected(recipe: Path, override: str, comment: str) -> None:
    recipe.write_text(recipe.read_text().replace("/data", "s3://b/x") + comment)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_PASSWORD.*--mlflow-secret") as error:
        render(str(recipe), [override] if override else [], JobOptions(1, 1))
    assert "hunter2" not in str(error.value)
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


def test_usage_errors_and_invalid_recipes_do_not_echo_credentials(
    convoy_refuses: RunText, recipe: Path
) -> None:
    assert "hunter2" not in convoy_refuses("train", recipe, "--uri=http://me:hunter2@host")
    recipe.write_text(
        RECIPE + "tracking: {uri: http://a-name-that-is-quite-long.for-this:hunter2@"
        "host.example.com:5000/x, }: }\n"
    )
    stderr = convoy_refuses("train", recipe)
    assert "hunter2" not in stderr
    assert "line 4" in stderr


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at http://me:hunter2@host:5000/x", "at http://host:5000/x"),
        ("'http://me:hun/ter#2@host'", "'http://host'"),
        ("postgresql://me:a%40b@host/db and s3://k:s@b/c", "postgresql://host/db and s3://b/c"),
        (
            "https://h/x?X-Amz-Credential=A&X-Amz-Date=2&X-Amz-Signature=b",
            "https://h/x?X-Amz-Credential=***&X-Amz-Date=2&X-Amz-Signature=***",
        ),
        ("https://a.blob/x?sv=2&sig=a%2Bb%3D&se=9", "https://a.blob/x?sv=2&sig=***&se=9"),
        ("?access_token=abc, ?api_key=x&password=y", "?access_token=*** ?api_key=***&password=***"),
        ("Authorization: Basic bWU6aHVudGVyMg==", "Authorization: Basic ***"),
        ("{'Authorization': 'Bearer eyJ0.abc'}", "{'Authorization': 'Bearer ***'}"),
    ],
)
def test_credentials_in_library_texts_are_redacted(text: str, redacted: str) -> None:
    assert redact_credentials(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c: not found",
        "http://localhost:5000/#/runs/a@b",
        "mail me@example.com: see https://example.com",
        "password=x is invalid: data.val: 'x'",
        "https://h/x?epoch=1&step=2#token",
        "Basic authentication failed; authorization: denied",
        "file:///a:b@c",
        "ratio 3:4@5, a://b c@d",
    ],
)
def test_text_without_credentials_is_unchanged(text: str) -> None:
    assert redact_credentials(text) == text


plain = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
secret = st.text(st.sampled_from("aB3~._-!$&()*+,;=%:"), min_size=8, max_size=16)


@settings(max_examples=60, deadline=None)
@given(
    plain.filter(lambda text: "://" not in text and "@" not in text),
    secret,
    st.sampled_from(["http", "s3", "postgresql+psycopg2"]),
)
def test_passwords_of_urls_are_removed(around: str, password: str, scheme: str) -> None:
    text = f"{around} {scheme}://me:Q9{password}@host/x {around}"
    assert f"Q9{password}" not in redact_credentials(text)
    assert redact_credentials(redact_credentials(text)) == redact_credentials(text)
    assert redact_credentials(text).endswith(f"://host/x {around}") or "=" in around


@settings(max_examples=60, deadline=None)
@given(plain.filter(lambda text: not {"@", "="} & {*text}))
@example("://:/?")
def test_texts_that_cannot_contain_credentials_are_unchanged(text: str) -> None:
    assert redact_credentials(text) == text


def test_secrets_of_the_environment_are_hidden_in_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtn+FEMI")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session==token")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2/")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr%20oxy7@127.0.0.1:9")
    monkeypatch.setenv("CONVOY_TERMINATION_LOG", str(tmp_path / "log"))
    forms = [
        "wJalr/XUtn+FEMI", "wJalr%2FXUtn%2BFEMI", "session==token", "hunter2/", "hunter2%2F",
        "pr%20oxy7", "pr oxy7",
        b64encode(b"me:hunter2/").decode(), b64encode(b"hunter2/").decode(),
    ]  # fmt: skip
    for error in (UserError(*forms), RuntimeError(" ".join(forms))):
        report(error, "convoy")
        shown = capsys.readouterr().err + (tmp_path / "log").read_text()
        assert not [form for form in forms if form in shown]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "convoy")
    assert (
        redact("convoy: a word that is also a password") == "convoy: a word that is also a password"
    )


def test_launcher_command_line_has_no_credentials_of_overrides(
    recipe: Path,
) -> None:
    """`convoy train` replaces its process with the launcher, whose arguments are public."""
    code = (
        "import os, sys; os.execv = lambda program, command: sys.exit(' '.join(command));"
        "sys.argv[1:] = ['train', 'digits-resnet8', 'tracking.uri=http://me:hunter2@host'];"
        "import pipelines.cli.main; pipelines.cli.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "tracking.uri=http://host" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_passwords_are_percent_decoded_once() -> None:
    password = "a%41@/ é"
    take_credentials([f"tracking.uri=http://me:{quote(password, safe='')}@host"])
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password
