"""``make demo``: runs the pipeline from images to a registered model that predicts.

It uses the same commands as a user.
"""

import fcntl
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.local import servers
from trainer.errors import RetryableError, UserError
from trainer.locks.run_lock import LOCK_NAME, exclusive
from trainer.process.supervisor import python_command

_RANKS = 2
_PACKAGE = "dataset-fashion-mnist"
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot"


@dataclass(frozen=True)
class _Data:
    """Real images on this machine, and how to train on them."""

    title: str
    source: Path
    name: str
    recipe: str
    shards: int
    class_names: str | None = None


def demo(folder: Path, keep: bool, digits: bool = False) -> dict[str, Any]:
    """Run the full pipeline, on ``digits`` or on the best available data.

    Writes ``summary.json`` and two plots to ``folder`` and returns the summary.
    """
    folder = folder.absolute()
    with exclusive(
        str(folder), "convoy demo", "use another --dir, or wait until that process ends"
    ):
        return _demo(folder, keep, digits)


def _demo(folder: Path, keep: bool, digits: bool) -> dict[str, Any]:
    started = time.monotonic()
    servers.down(folder / "services")  # services of an earlier demo that was run with KEEP=1
    _clear(folder)
    data = _digits(folder, "requested by --digits") if digits else _find_data(folder)
    _log(f"data: {data.title}")
    services = servers.up(folder / "services")
    try:
        environment = (
            os.environ | services.environment() | {"CUDA_VISIBLE_DEVICES": ""}
        )  # CPU only, so that the demo is the same everywhere, on two ranks
        os.environ |= services.environment()  # for the plots, which read from the same servers
        summary = _pipeline(folder, data, environment)
        summary["wall_seconds"] = round(time.monotonic() - started, 1)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        _print_page(folder, data, summary, services.mlflow_url if keep else None)
    finally:
        if not keep:
            servers.down(folder / "services")
    return summary


def _clear(folder: Path) -> None:
    """Remove the files of an earlier demo, but not the lock of this one."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink()


def _pipeline(folder: Path, data: _Data, environment: dict[str, str]) -> dict[str, Any]:
    bucket = f"s3://{servers.BUCKET}/{data.name}"
    names = ["--class-names", data.class_names] if data.class_names else []
    _convoy(environment, "pack", str(data.source), bucket, "--shards", str(data.shards), *names)
    verified = json.loads(_convoy(environment, "verify", bucket, "--json", capture=True))
    _convoy(
        environment, "train", data.recipe, "--procs", str(_RANKS),
        f"data.train={bucket}/train", f"data.val={bucket}/val",
        f"tracking.register_as={data.name}", f"train.output_dir={folder}/train",
    )  # fmt: skip
    result = json.loads((folder / "train" / "result.json").read_text())
    uri = f"models:/{result['model']}@champion"
    loaded = json.loads(
        _convoy(environment, "evaluate", uri, f"{bucket}/val", "--json", capture=True)
    )
    _draw(folder, data, result, uri, f"{bucket}/val")
    splits = verified["splits"]
    return {
        "model": result["model"],
        "version": result["version"],
        "alias": result["alias"],
        "top1": result["top1"],
        "top5": result["top5"],
        "registry_top1": loaded["top1"],
        "steps": result["steps"],
        "ranks": result["ranks"],
        "shards": sum(split["shards"] for split in splits),
        "samples": sum(split["samples"] for split in splits),
        "images_per_second": round(result["images_per_second"], 1),
        "data_wait_fraction": round(result["data_wait_fraction"], 4),
        "train_seconds": round(result["train_seconds"], 1),
        "wall_seconds": 0.0,
        "mlflow_run_id": result["mlflow_run_id"],
        "data": data.title,
    }


def _draw(folder: Path, data: _Data, result: dict[str, Any], uri: str, val: str) -> None:
    from mlflow.tracking import MlflowClient

    from pipelines.registry.evaluate import load_predict
    from pipelines.registry.plots import plot_curves, plot_predictions

    client = MlflowClient()
    plot_curves(
        client, result["mlflow_run_id"], f"{data.title}, {_RANKS} ranks", folder / "curves.png"
    )
    predict, _ = load_predict(uri)
    plot_predictions(predict, val, data.title, folder / "predictions.png")
    for name in ("curves.png", "predictions.png"):
        client.log_artifact(result["mlflow_run_id"], str(folder / name))


def _convoy(environment: dict[str, str], *arguments: str, capture: bool = False) -> str:
    """Run a ``convoy`` command as a user would.

    Raises UserError if its exit code is 2, and RetryableError for any other failure.
    """
    _log(f"convoy {' '.join(arguments)}")
    done = subprocess.run(
        [*python_command("pipelines.cli.main"), *arguments],
        env=environment, stdout=subprocess.PIPE if capture else None, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 2:
        raise UserError(f"`convoy {arguments[0]}` ended with exit code 2; see the error above")
    if done.returncode:
        raise RetryableError(f"`convoy {arguments[0]}` ended with exit code {done.returncode}")
    return done.stdout or ""


def _find_data(folder: Path) -> _Data:
    """Return Fashion-MNIST, installed or fetched with apt.

    If it is unavailable, returns scikit-learn's digits, which are part of every installation.
    """
    fashion = find_fashion()
    if fashion is None:
        return _digits(folder, "Fashion-MNIST is unavailable")
    names = folder / "classes.txt"
    names.write_text(
        "".join(f"{i} {name.replace('-', ' ')}\n" for i, name in enumerate(_FASHION.split()))
    )
    return _Data("Fashion-MNIST", fashion, "fashion-mnist", "fashion-resnet8", 12, str(names))


def find_fashion() -> Path | None:
    """Return the folder of Fashion-MNIST's idx files, installed or fetched with apt, or None."""
    return _INSTALLED if _INSTALLED.is_dir() else _fetch_fashion()


def _fetch_fashion() -> Path | None:
    """Download Debian's package and unpack it into the cache.

    This needs no root and installs nothing. If several processes need the package, one downloads it
    and the others wait.
    """
    base = Path(
        os.environ.get("CONVOY_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"
    )
    found = base / _PACKAGE / str(_INSTALLED).lstrip("/")
    if found.is_dir():
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    base.mkdir(parents=True, exist_ok=True)
    with (base / f"{_PACKAGE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.is_dir():
            _unpack_fashion(base / _PACKAGE)
    return found if found.is_dir() else None


def _unpack_fashion(target: Path) -> None:
    """Download the package and unpack it to ``target``, or print why that failed."""
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _log(f"fetching Debian's {_PACKAGE}")
    attempts = [["apt-get", "download", _PACKAGE]]
    if os.geteuid() == 0:
        attempts += [
            ["apt-get", "update", "-qq"],
            attempts[0],
        ]  # a new machine has no package lists yet
    for command in attempts:
        done = subprocess.run(command, cwd=part, capture_output=True, text=True, check=False)
        packages = list(part.glob("*.deb"))
        if done.returncode == 0 and packages:
            subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(part)], check=True)
            packages[0].unlink()
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            return
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    _log(f"{_PACKAGE} cannot be fetched: {reason}")


def _digits(folder: Path, why: str) -> _Data:
    """Write scikit-learn's 1,797 handwritten digits of 8x8 pixels as class folders.

    Every fifth image is for validation.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = (
            folder
            / "digits"
            / ("val" if number % 5 == 0 else "train")
            / str(label)
            / f"{number:04d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(path)
    return _Data(
        f"scikit-learn's digits ({why})", folder / "digits", "digits", "digits-resnet8", 12
    )


def _log(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _print_page(folder: Path, data: _Data, summary: dict[str, Any], mlflow_url: str | None) -> None:
    table = Table(title=f"Convoy demo: {data.title}", show_header=False, title_justify="left")
    for name, value in (
        ("model", f"{summary['model']} version {summary['version']}, alias {summary['alias']}"),
        ("top-1, top-5", f"{summary['top1']:.2%}, {summary['top5']:.2%}"),
        ("top-1 from the registry", f"{summary['registry_top1']:.2%}"),
        ("data", f"{summary['samples']:,} images in {summary['shards']} shards"),
        (
            "training",
            f"{summary['steps']:,} steps on {summary['ranks']} ranks in "
            f"{summary['train_seconds']:.0f} s",
        ),
        (
            "speed",
            f"{summary['images_per_second']:,.0f} images/s, waiting for data "
            f"{summary['data_wait_fraction']:.1%}",
        ),
        ("total time", f"{summary['wall_seconds']:.0f} s"),
        ("plots", f"{folder / 'curves.png'}\n{folder / 'predictions.png'}"),
        ("MLflow", mlflow_url or "stopped; KEEP=1 make demo keeps it running"),
    ):
        table.add_row(name, str(value))
    Console().print(table)
    if mlflow_url:
        print(f"to stop the services: convoy local down --dir {folder / 'services'}")
