"""``convoy local up|down|status``: an S3 server and an MLflow server on loopback, for one machine.

The S3 server is SeaweedFS.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.errors import UserError

BUCKET = "convoy"
_STATE = "services.json"
_ATTEMPTS = 3
_START_SECONDS, _STOP_SECONDS = (
    120.0,
    40.0,
)  # the S3 server drains its own streams for 15 s before it exits


class _Died(RuntimeError):
    """A service exited during startup."""


@dataclass(frozen=True)
class Process:
    """A started process; its start time distinguishes it from a later process with the same id."""

    pid: int
    started: float

    def handle(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            alive = (
                process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


@dataclass(frozen=True)
class Services:
    """Addresses, credentials and processes of the services."""

    folder: Path
    s3_url: str
    mlflow_url: str
    access_key: str
    secret_key: str
    processes: dict[str, Process]

    def environment(self) -> dict[str, str]:
        """Return the environment variables that every Convoy command reads."""
        return {
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
        }

    def save(self) -> None:
        state = {
            "s3_url": self.s3_url,
            "mlflow_url": self.mlflow_url,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
        }
        state |= {"processes": {name: vars(process) for name, process in self.processes.items()}}  # type: ignore[dict-item]
        _write_private(self.folder / _STATE, json.dumps(state, indent=1))

    def alive(self) -> dict[str, bool]:
        return {name: process.handle() is not None for name, process in self.processes.items()}


def load(folder: Path) -> Services | None:
    """Return the services that ``up`` started in ``folder``, or None if nothing was started."""
    try:
        state = json.loads((folder / _STATE).read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"{folder / _STATE}: cannot be read: {error}") from None
    processes = {name: Process(**process) for name, process in state.pop("processes").items()}
    return Services(folder, processes=processes, **state)


def up(folder: Path) -> Services:
    """Start both services, unless both are running; return their addresses.

    If only one is running, both are restarted. Data and credentials in ``folder`` persist across
    restarts. Raises UserError.
    """
    folder = folder.absolute()
    running = load(folder)
    if running is not None and all(running.alive().values()):
        return running
    if running is not None:
        down(folder)
    try:
        for name in ("s3", "mlflow"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    for attempt in range(_ATTEMPTS):
        try:
            return _start(folder)
        except _Died as error:  # another process may have taken one of its ports in the meantime
            if attempt == _ATTEMPTS - 1:
                raise UserError(str(error)) from None
    raise AssertionError("unreachable")


def _start(folder: Path) -> Services:
    access_key, secret_key = _credentials(folder)
    s3_port, mlflow_port, *weed_ports = _free_ports(2 + 7)
    s3_url, mlflow_url = f"http://127.0.0.1:{s3_port}", f"http://127.0.0.1:{mlflow_port}"
    processes: dict[str, Process] = {}
    services = Services(folder, s3_url, mlflow_url, access_key, secret_key, processes)
    try:
        processes["s3"] = _start_s3(folder, s3_port, weed_ports)
        processes["mlflow"] = _start_mlflow(
            services, mlflow_port
        )  # it needs the store only for artifacts
        services.save()
        _wait(services, "s3", lambda: _make_bucket(services))
        _wait(
            services,
            "mlflow",
            lambda: urllib.request.urlopen(f"{mlflow_url}/health", timeout=2).status == 200,
        )
    except BaseException:
        services.save()
        down(folder)
        raise
    return services


def down(folder: Path, grace_seconds: float = _STOP_SECONDS) -> list[str]:
    """Stop the running services by process id, MLflow first; the data is kept.

    ``grace_seconds``: time from SIGTERM to SIGKILL. Returns the names of the stopped services.
    """
    services = load(folder.absolute())
    if services is None:
        return []
    stopped = []
    for name in ("mlflow", "s3"):
        process = services.processes[name].handle() if name in services.processes else None
        if process is not None:
            _stop(process, grace_seconds)
            stopped.append(name)
    (services.folder / _STATE).unlink()
    return stopped


def _stop(process: psutil.Process, grace_seconds: float) -> None:
    """Stop a process and its children with SIGTERM, and with SIGKILL after ``grace_seconds``."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, grace_seconds)
    for member in alive:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(alive, 5)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _credentials(folder: Path) -> tuple[str, str]:
    """Return the access key and secret key.

    They are created on the first start and kept with the data, readable only by their owner.
    """
    path = folder / "s3.json"
    if not path.exists():
        access_key, secret_key = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
        identity = {
            "name": "convoy",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        _write_private(path, json.dumps({"identities": [identity]}))
    pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return pair["accessKey"], pair["secretKey"]


def _write_private(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(text)
    part.replace(path)


def _free_ports(count: int) -> list[int]:
    """Return distinct free ports; another process may still take one before it is used."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _start_s3(folder: Path, port: int, others: list[int]) -> Process:
    names = (
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "s3.port.grpc",
    )
    command = [
        str(Path(sys.executable).parent / "weed"),
        f"-logdir={folder}",
        "server",
        f"-dir={folder / 's3'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.volumeSizeLimitMB=1024",
        "-master.telemetry=false",
        # it is the only master, but without this a restarted one waits for others
        "-master.electionTimeout=1s",
        "-volume.max=100",
        "-volume.preStopSeconds=0",
        "-s3",
        f"-s3.port={port}",
        "-s3.port.iceberg=0",  # disables the other catalogs, which have fixed ports
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        *(f"-{name}={number}" for name, number in zip(names, others, strict=True)),
    ]
    return _spawn(command, folder / "s3.log", dict(os.environ))


def _start_mlflow(services: Services, port: int) -> Process:
    folder = services.folder
    environment = os.environ | services.environment() | {"MLFLOW_S3_ENDPOINT_URL": services.s3_url}
    environment |= {
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    environment |= {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"
    }  # the dependencies of its evaluation jobs are slow to start
    environment.pop("MLFLOW_TRACKING_URI")
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"),
        *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
    ]
    return _spawn(command, folder / "mlflow.log", environment)


def _spawn(command: list[str], log: Path, environment: dict[str, str]) -> Process:
    """Start a process that outlives this one and writes its output to ``log``."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Process(child.pid, psutil.Process(child.pid).create_time())


def _make_bucket(services: Services) -> bool:
    """Create the bucket; return True once the S3 server accepts a signed request."""
    import boto3
    from botocore.client import Config

    client: Any = boto3.client(
        "s3",
        endpoint_url=services.s3_url,
        aws_access_key_id=services.access_key,
        aws_secret_access_key=services.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
    return True


def _wait(services: Services, name: str, ready: Callable[[], bool]) -> None:
    """Wait until ``ready`` succeeds.

    Raises _Died if the process exits, and UserError after a timeout, both with the end of the log.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    log = services.folder / f"{name}.log"
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up:
        try:
            if ready():
                return
        except (urllib.error.URLError, OSError, BotoCoreError, ClientError):
            pass
        if services.processes[name].handle() is None:
            raise _Died(f"{name} exited during startup; end of {log}: {_tail(log)}")
        time.sleep(0.1)
    raise UserError(
        f"{name} did not start within {_START_SECONDS:.0f} s; end of {log}: {_tail(log)}"
    )


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])
