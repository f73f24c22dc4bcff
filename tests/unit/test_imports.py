"""Imports go one way: the layout's order, and never from the program in the pods to what stands around them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each module may import those above it.
LAYERS = [
    ["trainer.redaction", "trainer.disk_faults"],
    ["trainer.errors", "trainer.console", "trainer.watchdog", "trainer.lock_owner", "trainer.credentials"],
    ["trainer.streams", "trainer.proxies", "trainer.file_limit", "trainer.stop_signals", "trainer.launch_environment"],
    ["trainer.supervise"],
    ["trainer.recipe", "trainer.fields", "trainer.disk"],
    ["trainer.config"],
    ["trainer.hardware_faults"],
    ["trainer.data"],
    ["trainer.lock_file"],
    ["trainer.run_lock"],
    ["trainer.models"],
    ["trainer.engine.batch", "trainer.engine.schedule", "trainer.engine.optimizer", "trainer.engine.objective"],
    ["trainer.engine.deepspeed_config", "trainer.engine.parallel"],
    ["trainer.engine.stage", "trainer.engine.state", "trainer.engine.gradients", "trainer.engine.cuda_graphs"],
    ["trainer.engine.grad_norm", "trainer.engine.loss_scale"],
    ["trainer.engine.base"],
    ["trainer.engine.data_parallel", "trainer.engine.pipeline_parallel"],
    ["trainer.tracking", "trainer.checkpoint"],
    ["trainer.engine.loop"],
    ["trainer.resolve", "trainer.export", "trainer.serving", "trainer.packaged_code", "trainer.fault_log"],
    ["trainer.pod", "trainer.run_status"],
    ["trainer.class_matching", "trainer.weights_file"],
    ["trainer.preflight", "trainer.registration", "trainer.launch", "trainer.weights"],
    ["trainer.records"],
    ["trainer.__main__"],
    ["pipelines"],
]


def _level(module: str) -> int:
    names = [(name, i) for i, layer in enumerate(LAYERS) for name in layer]
    matches = [(len(name), i) for name, i in names if module == name or module.startswith(f"{name}.")]
    assert matches, f"{module} stands in no layer: add it to LAYERS"
    return max(matches)[1]


def _modules() -> list[tuple[str, Path]]:
    files = [p for package in ("trainer", "pipelines") for p in sorted((ROOT / package).rglob("*.py"))]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in files]


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("trainer", "pipelines")}


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(module: str, path: Path) -> None:
    if module == "trainer":
        assert not _imported(path)
        return
    known = {name for name, _ in _modules()}
    for imported in _imported(path) & known - {"trainer", "trainer.engine"}:
        assert _level(imported) <= _level(module), f"{module} imports {imported}, which comes after it"


@pytest.mark.parametrize("heavy", ["torch", "mlflow", "deepspeed", "pandas"])
def test_the_command_line_starts_without_heavy_packages(heavy: str) -> None:
    code = f"import sys, pipelines.cli, trainer.resolve; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_rank_that_tracks_nothing_does_not_load_mlflow() -> None:
    """DeepSpeed would, where it is installed. It can be loaded afterwards."""
    code = (
        "import sys; from trainer.engine import parallel; parallel.join(parallel.ranks_from_environment()); parallel.leave();"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules and 'pandas' not in sys.modules; import mlflow"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
