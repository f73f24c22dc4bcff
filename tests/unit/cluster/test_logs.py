"""``convoy logs`` and ``convoy status`` of a job's log, from an API server of three answers; those
of a real one are in tests/cluster.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from support.helpers import RunText

from trainer.progress.progress_record import LINE_PREFIX, ProgressRecord

JOB = {
    "metadata": {"name": "r50", "namespace": "team", "labels": {}},
    "spec": {"nprocPerNode": "1", "pytorchReplicaSpecs": {"Worker": {"replicas": 1}}},
    "status": {"conditions": [{"type": "Running", "status": "True"}]},
}
POD = {
    "metadata": {
        "name": "r50-worker-0",
        "uid": "1",
        "creationTimestamp": "2026-11-28T00:00:00Z",
    },
    "status": {"phase": "Running", "containerStatuses": []},
}
RECORD = ProgressRecord(
    run_name="r50", phase="training", updated_at=1.0, step=400, total_steps=1000, eta_seconds=9.0
)
LOG = f"""r50: resnet50 on 1,281,167 images
step 400/1000 epoch 0.08 loss 5.1
{LINE_PREFIX}{RECORD.to_json()}
{LINE_PREFIX}{{"corrupt
convoy: MLflow cannot be reached
"""


class _Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/pods/r50-worker-0/log"):
            content = LOG
        elif path.endswith("/pods"):
            content = json.dumps({"kind": "PodList", "apiVersion": "v1", "items": [POD]})
        else:
            content = json.dumps(JOB)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain" if content is LOG else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [
                {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}
            ],
            "clusters": [
                {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
            ],
            "users": [{"name": "u", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}
        server.shutdown()


def test_logs_are_the_lines_for_people(convoy_ok: RunText, cluster: dict[str, str]) -> None:
    lines = [line for line in LOG.splitlines() if not line.startswith(LINE_PREFIX)]
    assert convoy_ok("logs", "r50", env=cluster).splitlines() == lines


def test_status_is_read_from_the_records(convoy_ok: RunText, cluster: dict[str, str]) -> None:
    assert convoy_ok("status", "r50", env=cluster) == (
        "r50: training: step 400 of 1,000, 0:00:09 left\n"
    )
    assert json.loads(convoy_ok("status", "r50", "--json", env=cluster)) == {
        "name": "r50",
        "state": "training",
        "says": "step 400 of 1,000, 0:00:09 left",
        "step": 400,
        "total": 1000,
        "images_per_second": None,
        "left": "0:00:09",
        "mlflow": None,
        "exit_code": None,
    }
