"""Passwords in every place of a training's configuration appear in none of its outputs."""

import threading
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import psutil
import pytest
from support.helpers import run_convoy

from pipelines.local import servers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

IN_RECIPE, IN_OVERRIDE, IN_VARIABLE, OF_PROXY = (
    "Re7/cipe@Pw",
    "Ov8/erride@Pw",
    "Va9/riable@Pw",
    "Pr0/xy@Pw",
)


def _leaks(content: bytes, secrets: list[str]) -> list[str]:
    """Return the ``secrets`` in ``content``: plain, percent-encoded, or in base64 alone or after a
    user name.
    """
    found = []
    for secret in secrets:
        forms = {secret, quote(secret, safe=""), quote(secret)}
        forms |= {
            b64encode(text.encode()).decode().rstrip("=") for text in (secret, f"me:{secret}")
        }
        found += [secret for form in forms if form.encode() in content]
    return found


class _CommandLines(threading.Thread):
    """Polls the command lines of all descendants of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    self.seen.add("\0".join(process.cmdline()))
                except psutil.Error:
                    continue


def test_passwords_appear_in_no_output_of_a_run(
    services: servers.Services,
    client: "MlflowClient",
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    def with_password(password: str) -> str:
        return services.mlflow_url.replace("://", f"://me:{quote(password, safe='')}@")

    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        f"# {with_password(IN_RECIPE)}\nname: secretive\nmodel: {{name: resnet8}}\n"
        f"data: {{train: {digits}/train, val: {digits}/val, image_size: 8, workers: 0}}\n"
        "batch: {global_size: 64, micro_size: 32}\naugment: {crop: none, flip: false}\n"
        f"train: {{max_steps: 2, output_dir: {tmp_path}/out}}\n"
        f'tracking: {{uri: "{with_password(IN_RECIPE)}", experiment: secretive, '
        "register_as: secretive}\n"
    )
    environment = services.environment() | {
        "MLFLOW_TRACKING_URI": with_password(IN_VARIABLE),
        "http_proxy": f"http://me:{quote(OF_PROXY, safe='')}@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    override = f"tracking.uri={with_password(IN_OVERRIDE)}"
    watcher = _CommandLines()
    watcher.start()
    done = run_convoy("train", recipe, override, "--procs", 2, env=environment)
    watcher.done.set()
    watcher.join()
    assert done.returncode == 0, done.stderr

    secrets = [IN_RECIPE, IN_OVERRIDE, IN_VARIABLE, OF_PROXY, services.secret_key]
    assert not _leaks((done.stdout + done.stderr).encode(), secrets)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "config.json", "environment.txt", "result.json"} <= {
        path.name for path in files
    }
    assert not {str(path): found for path in files if (found := _leaks(path.read_bytes(), secrets))}
    after = [line for line in watcher.seen if "trainer" in line and "pipelines.cli" not in line]
    assert any("\0trainer.__main__\0" in line for line in after), (
        "the command lines of the ranks were read"
    )
    assert not _leaks("\n".join(after).encode(), secrets)
    (run,) = client.search_runs([client.get_experiment_by_name("secretive").experiment_id])
    version = client.get_model_version_by_alias("secretive", "champion")
    client.download_artifacts(run.info.run_id, "", str(_make_folder(tmp_path / "artifacts")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", services.mlflow_url)
    mlflow.artifacts.download_artifacts(
        "models:/secretive@champion", dst_path=str(_make_folder(tmp_path / "model"))
    )
    described = repr(
        (run.to_dictionary(), dict(version), client.get_registered_model("secretive").__dict__)
    )
    assert urlsplit(run.data.params["tracking.uri"]).netloc == urlsplit(services.mlflow_url).netloc
    assert not _leaks(described.encode(), secrets)
    stored = [
        path
        for folder in ("artifacts", "model")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    ]
    assert {"recipe.yaml", "MLmodel"} <= {path.name for path in stored}
    assert not {
        str(path): found for path in stored if (found := _leaks(path.read_bytes(), secrets))
    }


def _make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder
