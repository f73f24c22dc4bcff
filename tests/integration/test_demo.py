"""The demo, with the smaller dataset."""

import json
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support.helpers import RunText

from pipelines.local import demo


def test_demo_trains_and_registers_a_model(convoy_ok: RunText, tmp_path: Path) -> None:
    before = {p.pid for p in psutil.process_iter()}
    shown = convoy_ok("demo", "--digits", "--dir", tmp_path / "demo")
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert set(summary) >= {
        "model", "version", "alias", "top1", "top5", "registry_top1", "steps", "ranks", "shards",
        "samples", "images_per_second", "data_wait_fraction", "wall_seconds", "mlflow_run_id",
    }  # fmt: skip
    assert (summary["samples"], summary["ranks"], summary["alias"]) == (1797, 2, "champion")
    assert summary["registry_top1"] == summary["top1"] > 0.9
    assert summary["shards"] >= 12
    for name in ("curves.png", "predictions.png"):
        assert min(Image.open(tmp_path / "demo" / name).size) > 300
    assert "scikit-learn's digits" in shown
    leftover = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    assert not leftover, "processes were left running"


def test_demo_uses_digits_without_the_fashion_mnist_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    data = demo._find_data(tmp_path)
    if demo._INSTALLED.is_dir():
        assert data.title == "Fashion-MNIST"
    else:
        assert data.title == "scikit-learn's digits (Fashion-MNIST is unavailable)"
        assert len(list(data.source.rglob("*.png"))) == 1797
