"""Creates a real Kubernetes on this machine for tests; needs root, Debian and Go.

It has one real node, a control plane and the training operator.

cluster.py up [--state FOLDER] [--without-trainer]    prints `export KUBECONFIG=...`
cluster.py down [--state FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configs
import images
from operator_pod import apply_operator, wait_for_operator
from state import CHECKOUT, ClusterError, State, cache, default_state, end, wait_for
from supervisor import cgroup_folders

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mount": "mount",
    "unshare": "util-linux",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "debootstrap": "debootstrap",
}


def log(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def install_packages() -> None:
    missing = sorted(
        {package for program, package in PACKAGES.items() if not shutil.which(program)}
    )
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(f"these Debian packages are missing: {' '.join(missing)}; install them")
    log(f"installing {' '.join(missing)}")
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ([*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *missing]):
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


@contextlib.contextmanager
def building_programs() -> Iterator[Callable[[], Path]]:
    """Compile the programs in the background.

    Yields a function that waits until they are built and returns their folder.
    """
    process = subprocess.Popen(
        [HERE / "build.sh"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def finished(seconds: float | None = None) -> Path:
        folder, _ = process.communicate(timeout=seconds)
        if process.returncode:
            raise ClusterError("the cluster's programs could not be built")
        return Path(folder.strip())

    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            finished(1)  # report a build that cannot start before minutes of other work
        yield finished
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # the compiler's processes too
            process.wait()


class Supervisor:
    """The first process in the cluster's namespaces.

    It starts the node's image store at once, and the other programs in ``start_all``.
    """

    def __init__(self, state: State, store: Path) -> None:
        self.state = state
        with (
            socket.create_server(("127.0.0.1", 0), backlog=512) as listener,
            (state.folder / "supervisor.log").open("wb") as log,
        ):
            self.port = int(listener.getsockname()[1])  # port of the API server on this machine
            self.process = subprocess.Popen(
                [
                    "unshare", "--pid", "--fork", "--kill-child", "--mount",
                    "--propagation", "private", "--mount-proc", "--net",
                    sys.executable, str(HERE / "supervisor.py"),
                    str(state.folder), str(store), str(listener.fileno()),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
        state.record([self.process.pid])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait_for(
            "the supervisor",
            lambda: self.process.poll() is not None or bool(children.read_text().split()),
            10,
            0.01,
        )
        if self.process.poll() is None:
            state.record([self.process.pid, int(children.read_text().split()[0])])
        self._until("containerd")

    def start_all(self, programs: Path) -> None:
        assert self.process.stdin is not None
        with self.process.stdin, contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{programs}\n")
        self._until("agents")

    def _until(self, last: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, seconds = line.split()
            log(f"{name} {seconds} s")
            if name == last:
                return
        raise ClusterError(
            f"the cluster did not start; see {self.state.folder}/supervisor.log and "
            f"{self.state.logs}"
        )


class Kubectl:
    """Runs kubectl of the cluster's version."""

    def __init__(self, state: State, programs: Path) -> None:
        self.command = [str(programs / "kubectl"), "--kubeconfig", str(state.kubeconfig)]

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [*self.command, *arguments], input=stdin, capture_output=True, text=True
        )
        if done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def succeeds(self, *arguments: str, stdin: str | None = None) -> bool:
        return (
            subprocess.run(
                [*self.command, *arguments], input=stdin, capture_output=True, text=True
            ).returncode
            == 0
        )

    def apply(self, *manifests: dict[str, Any]) -> None:
        self(
            "apply",
            "--server-side",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}),
        )


def write_kubeconfig(state: State, port: int) -> None:
    text = state.inner_kubeconfig.read_text()
    inner = f"https://127.0.0.1:{configs.API_PORT}"
    if inner not in text:
        raise ClusterError(f"{state.inner_kubeconfig} does not name {inner}")
    state.kubeconfig.touch(mode=0o600)
    state.kubeconfig.write_text(text.replace(inner, f"https://127.0.0.1:{port}"))


def print_exports(state: State, tools: Path) -> None:
    print(f"export PATH={tools}/bin:$PATH\nexport KUBECONFIG={state.kubeconfig}")


def up(state: State, with_trainer: bool) -> None:
    if os.geteuid() and not state.running():
        raise ClusterError("root is needed to create namespaces, mounts and cgroups")
    with images.exclusive(cache(), log), building_programs() as finished:
        if state.running():
            log("already running")
            print_exports(state, finished())
            return
        clean(state)
        install_packages()
        debian_images = images.build(
            CHECKOUT, cache(), with_trainer, log
        )  # mostly disk and network, while the compiler uses the processor
        try:
            tools = start(state, debian_images, finished)
        except BaseException:
            log(f"the cluster did not start; logs: {state.logs}")
            end(state.running())
            raise
    print_exports(state, tools)


def start(state: State, debian_images: list[images.Image], finished: Callable[[], Path]) -> Path:
    state.folder.mkdir(parents=True)
    state.folder.chmod(0o755)
    state.record([])
    store = cache() / "cluster-store"
    store.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(state, store)
    node = images.Node(state, store)
    images.load(debian_images, cache(), node, log)  # mostly disk, too
    tools = finished()
    images.load(images.build_programs(tools / "bin", cache(), log), cache(), node, log)
    started = time.monotonic()
    supervisor.start_all(tools / "bin")
    write_kubeconfig(state, supervisor.port)
    kubectl = Kubectl(state, tools / "bin")
    apply_operator(state, tools, kubectl)
    kubectl.apply(*configs.volumes(state))
    wait_for("the node", lambda: kubectl.succeeds("get", f"node/{configs.NODE}"), 60)
    kubectl("wait", "--for=condition=Ready", "--timeout=60s", f"node/{configs.NODE}")
    log(f"node Ready after {time.monotonic() - started:.1f} s")
    wait_for_operator(kubectl)
    log(f"training-operator ready after {time.monotonic() - started:.1f} s")
    return tools


def clean(state: State) -> None:
    """Remove the cgroups and the folder of a cluster whose processes have ended."""
    for folder in cgroup_folders(state):
        if folder.is_dir():
            for group, _, _ in os.walk(folder, topdown=False):
                wait_for(f"removing {group}", lambda group=group: remove_group(group), 10)  # type: ignore[misc]
    if state.folder.exists():
        if not state.processes.exists() and any(state.folder.iterdir()):
            raise ClusterError(f"{state.folder} is not the folder of a cluster; choose another")
        shutil.rmtree(state.folder)


def remove_group(group: str) -> bool:
    try:
        os.rmdir(group)
    except FileNotFoundError:
        return True
    except OSError:  # its last process has not ended yet
        return False
    return True


def down(state: State) -> None:
    running = state.running()
    # The inner process is ended first: it lets containerd close its database. Then the outer one
    # ends too.
    end(running[1:])
    end(running[:1])
    clean(state)
    log("stopped")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="cluster.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument(
        "--state",
        type=Path,
        default=default_state(),
        help="the cluster's folder (default %(default)s)",
    )
    parser.add_argument(
        "--without-trainer",
        action="store_true",
        help="skip the trainer's image, which takes minutes to build",
    )
    arguments = parser.parse_args()
    state = State(arguments.state.resolve())
    try:
        if arguments.command == "up":
            up(state, not arguments.without_trainer)
        else:
            down(state)
    except ClusterError as error:
        log(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
