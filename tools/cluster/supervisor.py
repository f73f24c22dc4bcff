"""Starts the cluster and forwards connections to it, as the first process in its namespaces.

These are a process, a mount and a network namespace. When this process ends, the kernel ends every
process in them, including containers, and removes their mounts, interfaces and packet filter rules.
However a cluster ends, nothing of it remains in the machine's namespaces.

    supervisor.py STATE STORE LISTENER

LISTENER is the file descriptor of a listening socket in the machine's network.

The node's image store is started at once, the other programs when a line on standard input names
their folder: images are copied while the programs are compiled.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import configs
from state import State, wait_for

# The kubelet needs these values and would set them for the whole machine. It gets files that
# contain them already.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run(
        [str(part) for part in command],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, **(env or {})},
    )


def make_mounts(state: State) -> None:
    for folder in (
        "/run",
        "/var/lib",
        "/var/log",
    ):  # the kubelet, CNI plugins and shims write there despite their options
        run("mount", "-t", "tmpfs", "tmpfs", folder)
    settings = state.folder / "kernel"
    for name, value in KERNEL_SETTINGS.items():
        target = Path("/proc/sys") / name
        if target.is_file():
            shown = settings / name
            shown.parent.mkdir(parents=True, exist_ok=True)
            shown.write_text(f"{value}\n")
            run("mount", "--bind", shown, target)


def make_network() -> None:
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "cni0", "type", "bridge")
    run("ip", "address", "add", f"{configs.NODE_IP}/16", "dev", "cni0")
    run("ip", "link", "set", "cni0", "up")
    # Connections to services are redirected to a pod on the way out, which needs a route.
    run("ip", "route", "add", configs.SERVICE_CIDR, "dev", "cni0")
    for name in ("ipv4/ip_forward", "bridge/bridge-nf-call-iptables"):
        setting = Path("/proc/sys/net") / name
        if setting.exists():
            setting.write_text("1")


def cgroup_folders(state: State) -> list[Path]:
    """Return the folder of the cluster's cgroup in each hierarchy of this machine."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [
        Path(fields[1]) / state.cgroup for fields in mounts if fields[2] in ("cgroup", "cgroup2")
    ]


def make_cgroups(state: State) -> None:
    for folder in cgroup_folders(state):
        folder.mkdir(exist_ok=True)
        for name in (
            "cpuset.cpus",
            "cpuset.mems",
        ):  # empty in a new cgroup of version 1, in which nothing could run
            if (folder / name).exists() and (folder.parent / name).exists():
                (folder / name).write_text((folder.parent / name).read_text())


class Parts:
    """Starts the parts of the cluster, and prints the duration of each."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.programs = Path()  # not compiled yet
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str | Path) -> None:
        with (self.state.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.daemons.append(process)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        print(f"{name} {time.monotonic() - start:.1f}", flush=True)

    def node(self, store: Path) -> None:
        state, folder = self.state, self.state.folder
        (folder / "containerd.toml").write_text(configs.containerd(state, store))
        (folder / "cni").mkdir(exist_ok=True)
        (folder / "cni/10-convoy.conflist").write_text(configs.cni())
        self.start("containerd", "containerd", "--config", folder / "containerd.toml")

        def answers() -> bool:
            return (
                subprocess.run(
                    ["ctr", "-a", state.containerd, "version"], capture_output=True
                ).returncode
                == 0
            )

        wait_for("containerd", answers, 60)
        forget_containers(state)

    def control_plane(self) -> None:
        folder = self.state.folder
        (folder / "kwok.yaml").write_text(configs.kwokctl(self.state, self.programs))
        run(
            self.programs / "kwokctl", "create", "cluster", "--name", configs.CLUSTER,
            "--config", folder / "kwok.yaml", "--kubeconfig", self.state.inner_kubeconfig,
            "--wait", "60s",
            env={"KWOK_WORKDIR": str(folder / "kwok"), "HOME": str(folder)},
        )  # fmt: skip

    def agents(self) -> None:
        state, folder = self.state, self.state.folder
        (folder / "kubelet.json").write_text(configs.kubelet(state))
        (folder / "kube-proxy.json").write_text(configs.kube_proxy(state))
        (folder / "Corefile").write_text(configs.corefile(state))
        (folder / "resolv.conf").touch()
        self.start(
            "kubelet", self.programs / "kubelet", "--config", folder / "kubelet.json",
            "--kubeconfig", state.inner_kubeconfig, "--hostname-override", configs.NODE,
            "--node-ip", configs.NODE_IP, "--root-dir", folder / "kubelet",
        )  # fmt: skip
        self.start(
            "kube-proxy", self.programs / "kube-proxy", "--config", folder / "kube-proxy.json"
        )
        self.start("coredns", self.programs / "coredns", "-conf", folder / "Corefile")


def forget_containers(state: State) -> None:
    """Remove the containers of an earlier cluster from the store; their processes have ended."""
    ctr = ["ctr", "-a", str(state.containerd), "-n", "k8s.io"]
    old = subprocess.run(
        [*ctr, "containers", "ls", "-q"], check=True, capture_output=True, text=True
    ).stdout.split()
    if old:
        subprocess.run([*ctr, "containers", "rm", *old], check=True, stdout=sys.stderr)


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        api_reader, api_writer = await asyncio.open_connection("127.0.0.1", configs.API_PORT)
    except OSError:
        writer.close()
        return
    await asyncio.gather(forward(reader, api_writer), forward(api_reader, writer))


def reap() -> None:
    """Reap the orphans of the namespace, which its first process inherits."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


async def serve(listener: socket.socket) -> None:
    """Forward connections until SIGTERM.

    The listening socket is in the machine's network, new connections in the cluster's.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGCHLD, reap)
    server = await asyncio.start_server(connect, sock=listener)
    reap()
    await stop.wait()
    server.close()


def main() -> None:
    state, store = State(Path(sys.argv[1])), Path(sys.argv[2])
    listener = socket.socket(fileno=int(sys.argv[3]))
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # the kernel ignores signals to the first process that it does not handle
    state.logs.mkdir()
    lock = (store / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("cluster: another cluster uses the image store")
    make_mounts(state)
    make_network()
    make_cgroups(state)
    parts = Parts(state)
    with parts.timed("containerd"):
        parts.node(store)
    if not (programs := sys.stdin.readline().strip()):
        sys.exit("cluster: the process that started the supervisor has ended")
    parts.programs = Path(programs)
    with parts.timed("control-plane"):
        parts.control_plane()
    with parts.timed("agents"):
        parts.agents()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    asyncio.run(serve(listener))
    parts.daemons[0].terminate()  # containerd writes its store's database to disk
    with contextlib.suppress(subprocess.TimeoutExpired):
        parts.daemons[0].wait(5)


if __name__ == "__main__":
    main()
