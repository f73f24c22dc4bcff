"""The model registry: faults of a real server, and registering the model afterwards."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from support.mlflow_proxy import LOST, Answer, MlflowProxy, Request
from support.spools import write_run

from pipelines.registry.register import ensure_run, sync
from trainer.config.schema import load_config
from trainer.data.index import open_index
from trainer.errors import RetryableError, UserError
from trainer.export import model_registry
from trainer.export.exported_model import ModelMetadata, save_model
from trainer.export.model_registry import Registered, register


@pytest.fixture
def output(tmp_path: Path, digits: Path) -> Path:
    """The output folder of a finished run that MLflow does not have."""
    config = load_config(
        "digits-resnet8", [f"data.train={digits}/train", f"data.val={digits}/val", "model.width=4"]
    )
    classes = open_index(f"{digits}/train")[0].classes
    metadata = ModelMetadata.of(config, classes, len(classes))
    save_model(tmp_path / "out", metadata.build(), metadata)
    (tmp_path / "out/config.json").write_text(config.model_dump_json())
    result = {"mlflow_run_id": None, "name": "r", "steps": 5, "top1": 0.5, "top5": 0.9}
    (tmp_path / "out/result.json").write_text(json.dumps(result))
    return tmp_path / "out"


@pytest.fixture
def add(
    output: Path,
    proxy: MlflowProxy,
    client: MlflowClient,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Registered]:
    monkeypatch.setattr(model_registry, "_WAITS", (0.01, 0.01))
    run = client.create_run(client.create_experiment(experiment))
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    return lambda: register(
        proxy.url,
        run.info.run_id,
        experiment[:60],
        output,
        picture.getvalue(),
        0.5,
        0.9,
        "sha256:0",
    )


def test_rejected_upload_is_a_user_error_and_lost_responses_register_one_version(
    add: Callable[[], Registered], proxy: MlflowProxy, client: MlflowClient, experiment: str
) -> None:
    refused = (413, b"<html>Request Entity Too Large</html>", "text/html")
    proxy.hook = lambda r: refused if r.path.endswith("model.safetensors") else None
    with pytest.raises(UserError, match="too large"):
        add()
    lost = {"model-versions/create", "registered-models/create", "registered-models/alias"}

    def hook(request: Request) -> Answer:
        for call in lost:
            if request.method == "POST" and request.is_call(call):
                lost.remove(call)
                request.forward()
                return LOST
        return None

    proxy.hook = hook
    assert (add().version, add().version) == ("1", "1")
    assert lost == set()
    assert len(client.search_model_versions(f"name = '{experiment[:60]}'")) == 1


@pytest.mark.parametrize(
    ("status", "message"), [(403, "refuses the credentials"), (400, "refuses to register")]
)
def test_rejection_by_the_registry_is_a_user_error(
    status: int, message: str, add: Callable[[], Registered], proxy: MlflowProxy
) -> None:
    refused = (status, b"<html>no</html>", "text/html")
    proxy.hook = lambda r: refused if r.is_call("registered-models/create") else None
    with pytest.raises(UserError, match=message):
        add()


def test_persistent_server_error_is_retryable(
    add: Callable[[], Registered], proxy: MlflowProxy
) -> None:
    proxy.hook = lambda r: (
        (503, b"", "text/html") if r.is_call("registered-models/create") else None
    )
    with pytest.raises(RetryableError, match="did not register"):
        add()
    assert proxy.calls("registered-models/create") >= 3


@pytest.mark.parametrize("spooled", [True, False], ids=["from-its-spool", "never-tracked"])
def test_missing_run_is_created_to_register_its_model(
    spooled: bool,
    output: Path,
    proxy: MlflowProxy,
    client: MlflowClient,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the spool has entries of another run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    if spooled:
        write_run(output / "tracking.jsonl", experiment, "other")
        key = write_run(output / "tracking.jsonl", experiment, "r")
        result = json.loads((output / "result.json").read_text()) | {"run_key": key}
        (output / "result.json").write_text(json.dumps(result))
    run = client.get_run(ensure_run(output))
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert ensure_run(output) == run.info.run_id
    assert not (output / "tracking.jsonl").exists()
    if not spooled:
        assert run.data.params["model.name"] == "resnet8"
        assert run.data.metrics == {"top1": 0.5, "top5": 0.9}


def test_sync_does_not_store_the_id_of_another_run_in_the_result(
    output: Path, proxy: MlflowProxy, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    result = json.loads((output / "result.json").read_text()) | {"run_key": "0000000000001-a"}
    (output / "result.json").write_text(json.dumps(result))
    write_run(output / "tracking.jsonl", experiment, "other")
    report = sync(str(output / "tracking.jsonl"))
    report.raise_if_incomplete()
    assert len(report.lines()) == 1
    assert json.loads((output / "result.json").read_text()) == result
