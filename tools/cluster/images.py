"""Builds the images of the test cluster with buildah, and copies them to the node's image store.

An image is rebuilt only if its inputs change. No registry is used: debootstrap creates the base.
The store is kept for the next cluster, so a change of the code copies only the layers with code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from state import ClusterError, State

DEBOOTSTRAP = ("debootstrap", "--variant=minbase", "--include=python3,ca-certificates", "bookworm")
BOOTSTRAP_TRIES = 3
# Includes the machine's local certificate authorities: behind a proxy that intercepts TLS, builds
# cannot download without them.
BASE_DOCKERFILE = """FROM scratch
ADD root.tar /
COPY certificates /usr/local/share/ca-certificates
RUN update-ca-certificates
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
CMD ["/bin/sh"]
"""
FILES = Path(__file__).resolve().parent / "images"
KEY_LABEL = "convoy.key"
BASE = "localhost/convoy-base:dev"
DEPENDENCY_INPUTS = ("Dockerfile", "requirements.lock", "pyproject.toml", "tools/setup.sh")
TRAINER_INPUTS = (
    *DEPENDENCY_INPUTS,
    ".dockerignore",
    "setup.py",
    "README.md",
    "LICENSE",
    "trainer",
    "pipelines",
    "convoy_entry",
)


@dataclass(frozen=True)
class Image:
    """The name of an image, and a digest of its inputs."""

    name: str
    key: str


def digest(*parts: str | Path) -> str:
    """Return a digest of texts and of the contents of files."""
    total = hashlib.sha256()
    for part in parts:
        total.update(
            hashlib.sha256(part.read_bytes() if isinstance(part, Path) else part.encode()).digest()
        )
    return total.hexdigest()[:16]


def sources(checkout: Path) -> Iterable[str | Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *TRAINER_INPUTS],
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in sorted(set(listed)):
        if (checkout / name).is_file():
            yield name
            yield checkout / name


class Builder:
    """Runs buildah with its storage in the cache, and records the inputs of each image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "built.json"
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "storage.conf"
        configuration.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\n'
            f'runroot = "{folder}/run"\n'
            '[storage.options.overlay]\nskip_mount_home = "true"\n'  # otherwise a mount remains
        )
        # In a chroot: a container with a separate network would change the machine's network.
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(configuration),
            "STORAGE_DRIVER": "overlay",
            "BUILDAH_ISOLATION": "chroot",
        }

    def run(
        self, *command: str | Path, stdin: str | None = None, cwd: Path | None = None, **more: str
    ) -> None:
        log = self.folder / "build.log"
        with log.open("ab") as output:
            done = subprocess.run(
                [str(part) for part in command], input=stdin and stdin.encode(), cwd=cwd,
                env={**self.environment, **more}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"{command[0]} failed; see {log}")

    def is_recorded(self, image: Image) -> bool:
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        return bool(known.get(image.name) == image.key)

    def is_built(self, image: Image) -> bool:
        found = subprocess.run(
            ["buildah", "images", "--quiet", image.name], env=self.environment, capture_output=True
        )
        return self.is_recorded(image) and found.returncode == 0

    def record_built(self, image: Image) -> None:
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.record.write_text(json.dumps({**known, image.name: image.key}, indent=2))

    def start_over_when_changed(self, dependencies: str) -> None:
        """Delete all images if the dependencies changed; only one layer of 5 GB is kept."""
        layer = Image("dependencies", dependencies)
        if not self.is_recorded(layer):
            self.record.unlink(missing_ok=True)
            self.run("buildah", "rmi", "--all", "--force")
            self.record_built(layer)

    def dockerfile(self, image: Image, text: str, context: Path, **arguments: str) -> None:
        options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        self.run(
            "buildah",
            "build",
            "--layers",
            "--format",
            "oci",
            *options,
            "-t",
            image.name,
            "-f",
            "-",
            context,
            stdin=text,
        )


def apt_mirror() -> str:
    """Return the mirror that this machine's apt uses."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    )
    sites = [site for site in listed.stdout.split() if "security" not in site]
    if not sites:
        raise ClusterError("apt has no mirror; run apt-get update")
    return sites[0]


def local_certificates() -> list[Path]:
    return sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))


def bootstrap(builder: Builder, root: Path) -> None:
    """Run debootstrap, with retries: it downloads packages and does not retry by itself."""
    mirror = apt_mirror()
    for left in reversed(range(BOOTSTRAP_TRIES)):
        shutil.rmtree(root, ignore_errors=True)
        try:
            builder.run(*DEBOOTSTRAP, root / "root", mirror)
            return
        except ClusterError:
            if not left:
                raise


def build_base(builder: Builder, image: Image) -> None:
    root = builder.folder / "base"
    bootstrap(builder, root)
    for waste in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / "root" / waste)
    builder.run("tar", "-C", root / "root", "-cf", root / "root.tar", ".")
    shutil.rmtree(root / "root")
    (root / "certificates").mkdir()
    for certificate in local_certificates():
        shutil.copy(certificate, root / "certificates")
    builder.dockerfile(image, BASE_DOCKERFILE, root)
    shutil.rmtree(root)


@contextlib.contextmanager
def exclusive(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Let one program at a time build and copy images.

    Other checkouts use the same storage and the same names.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "cluster-images.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("waiting for another program that builds images")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


Plan = list[tuple[Image, Callable[[Image], None]]]


def build_planned(builder: Builder, plan: Plan, log: Callable[[str], None]) -> list[Image]:
    """Build the images that are not built yet; return all images of the plan."""
    for image, make in plan:
        if not builder.is_built(image):
            start = time.monotonic()
            make(image)
            builder.record_built(image)
            log(f"built {image.name} in {time.monotonic() - start:.0f} s")
    return [image for image, _ in plan]


def build(
    checkout: Path, cache: Path, with_trainer: bool, log: Callable[[str], None]
) -> list[Image]:
    """Build the images that are based on Debian."""
    builder = Builder(cache / "cluster-images")
    postgres = (FILES / "postgres.Dockerfile").read_text()
    base = Image(BASE, digest(*DEBOOTSTRAP, BASE_DOCKERFILE, *local_certificates()))
    if with_trainer:
        builder.start_over_when_changed(
            digest(base.key, *(checkout / name for name in DEPENDENCY_INPUTS))
        )
    plan: Plan = [
        (base, lambda image: build_base(builder, image)),
        (
            Image(
                "localhost/convoy-postgres:dev", digest(base.key, postgres, FILES / "postgres.sh")
            ),
            lambda image: builder.dockerfile(image, postgres, FILES, BASE=BASE),
        ),
    ]
    if with_trainer:
        plan.append(
            (
                Image("localhost/convoy:dev", digest(base.key, *sources(checkout))),
                lambda image: builder.run(
                    checkout / "tools/image.sh", cwd=checkout, BASE=BASE, IMAGE=image.name
                ),
            )
        )
        fashion = (checkout / "k8s/overlays/local/data.Dockerfile").read_text()
        plan.append(
            (
                Image("localhost/convoy-fashion-mnist:dev", digest(base.key, fashion)),
                lambda image: builder.dockerfile(image, fashion, FILES, BASE=BASE),
            )
        )
    return build_planned(builder, plan, log)


def build_programs(programs: Path, cache: Path, log: Callable[[str], None]) -> list[Image]:
    """Build the images that hold one static program each."""
    builder = Builder(cache / "cluster-images")

    def single(
        name: str, program: str, path: str, user: int
    ) -> tuple[Image, Callable[[Image], None]]:
        text = f'FROM scratch\nCOPY {program} {path}\nUSER {user}:{user}\nENTRYPOINT ["{path}"]\n'
        return Image(name, digest(programs / program)), lambda image: builder.dockerfile(
            image, text, programs
        )

    plan = [
        single("localhost/pause:3.10", "pause", "/pause", 65535),
        single("localhost/convoy-training-operator:1.9.3", "training-operator", "/manager", 65532),
    ]
    return build_planned(builder, plan, log)


class Node:
    """The image store of the cluster's node."""

    def __init__(self, state: State, store: Path) -> None:
        self.ctr = ["ctr", "-a", str(state.containerd), "-n", "k8s.io"]
        self.files = store / "io.containerd.content.v1.content/blobs/sha256"

    def output(self, *arguments: str) -> str:
        return subprocess.run(
            [*self.ctr, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def has(self, image: Image) -> bool:
        return f"{KEY_LABEL}={image.key}" in self.output("images", "ls", f"name=={image.name}")

    def blobs(self) -> dict[str, int]:
        """Return the hexadecimal SHA-256 and the size in bytes of every blob in the store."""
        names = [
            line.removeprefix("sha256:") for line in self.output("content", "ls", "-q").split()
        ]
        return {name: (self.files / name).stat().st_size for name in names}

    def load(self, image: Image, layout: Path, known: dict[str, int]) -> None:
        """Import an OCI layout; ``known`` blobs are in the store already and are not in it."""
        index = layout / "index.json"
        manifests = json.loads(index.read_text())["manifests"]
        annotated = [
            {**manifest, "annotations": {"io.containerd.image.name": image.name}}
            for manifest in manifests
        ]
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": annotated}))
        new = [path for path in (layout / "blobs/sha256").iterdir() if path.name not in known]
        process = subprocess.Popen(
            [*self.ctr, "images", "import", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stderr is not None
        with (
            process.stdin,
            tarfile.open(fileobj=process.stdin, mode="w|", bufsize=1 << 20) as archive,
        ):
            for path in (layout / "oci-layout", *new, index):
                archive.add(path, arcname=str(path.relative_to(layout)))
                path.unlink()  # do not keep a third copy of a 6 GB layer
        error = process.stderr.read().decode()
        if process.wait():
            raise ClusterError(f"{image.name} cannot be imported: {error.strip()}")
        self.output("images", "label", image.name, f"{KEY_LABEL}={image.key}")


def load(images: list[Image], cache: Path, node: Node, log: Callable[[str], None]) -> None:
    """Copy the images that the node lacks to its store.

    The layout that skopeo writes to first gets empty files, of the right size, for all blobs in the
    node's store. Skopeo skips these, so only new blobs are written, read and unpacked. Layers stay
    uncompressed, because compression is the slowest step.
    """
    builder = Builder(cache / "cluster-images")
    for image in images:
        if node.has(image):
            continue
        start = time.monotonic()
        layout = builder.folder / "layout"
        shutil.rmtree(layout, ignore_errors=True)
        (layout / "blobs/sha256").mkdir(parents=True)
        (layout / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
        known = node.blobs()
        for name, size in known.items():
            with (layout / "blobs/sha256" / name).open("wb") as file:
                file.truncate(size)
        source, destination = f"containers-storage:{image.name}", f"oci:{layout}:{image.name}"
        builder.run(
            "skopeo",
            "copy",
            "--insecure-policy",
            "--dest-oci-accept-uncompressed-layers",
            source,
            destination,
        )
        node.load(image, layout, known)
        shutil.rmtree(layout)
        log(f"copied {image.name} to the node in {time.monotonic() - start:.1f} s")
