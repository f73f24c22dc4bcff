"""Modules import only from their layer or a lower one; ``trainer`` never imports ``pipelines``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each module may import those above it.
LAYERS = [
    ["trainer.secrets.redaction", "trainer.faults.disk_errors"],
    ["trainer.progress.progress_record"],
    ["trainer.errors", "trainer.process.console", "trainer.training.watchdog"],
    ["trainer.dependencies"],
    ["trainer.locks.lock_owner", "trainer.secrets.credentials"],
    ["trainer.process"],
    ["trainer.config.load", "trainer.config.field_types", "trainer.faults.disk_space"],
    ["trainer.data.transforms"],
    ["trainer.config.model_options", "trainer.training.optimizers"],
    ["trainer.config.schema"],
    ["trainer.faults.hardware_errors"],
    ["trainer.data"],
    ["trainer.locks.lock_file"],
    ["trainer.locks.run_lock"],
    ["trainer.progress.progress_publisher"],
    ["trainer.models"],
    ["trainer.training.batch_plan", "trainer.training.lr_schedule"],
    ["trainer.training.optimizers.build", "trainer.training.loss"],
    ["trainer.engine.deepspeed.compat"],
    [
        "trainer.distributed.env",
        "trainer.distributed.collectives",
        "trainer.distributed.process_group",
    ],
    ["trainer.training.preemption", "trainer.engine.dropout_rng", "trainer.engine.partition"],
    ["trainer.engine.input_transfer", "trainer.engine.deepspeed"],
    ["trainer.engine.cuda_graphs", "trainer.engine.model_chunk", "trainer.engine.ema"],
    ["trainer.engine.engine"],
    ["trainer.engine.data_parallel", "trainer.engine.pipeline_parallel"],
    ["trainer.tracking"],
    [
        "trainer.training.checkpoint",
        "trainer.training.metrics",
        "trainer.training.evaluator",
        "trainer.training.divergence",
    ],
    ["trainer.config.run_plan"],
    ["trainer.training.trainer"],
    ["trainer.export.exported_model", "trainer.export.pyfunc_model"],
    ["trainer.export.packaged_code", "trainer.faults.node_fault_log"],
    ["trainer.distributed.pod_startup", "trainer.tracking.run_status"],
    ["trainer.weights.class_matching", "trainer.weights.state_dict_file"],
    [
        "trainer.config.preflight",
        "trainer.export.model_registry",
        "trainer.launch",
        "trainer.weights.pretrained",
    ],
    ["trainer.tracking.run_record"],
    ["trainer.__main__"],
    ["pipelines"],
]


def _level(module: str) -> int:
    names = [(name, i) for i, layer in enumerate(LAYERS) for name in layer]
    matches = [
        (len(name), i) for name, i in names if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} is in no layer: add it to LAYERS"
    return max(matches)[1]


def _modules() -> list[tuple[str, Path]]:
    files = [
        p for package in ("trainer", "pipelines") for p in sorted((ROOT / package).rglob("*.py"))
    ]
    return [
        (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p)
        for p in files
    ]


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("trainer", "pipelines")}


@pytest.mark.parametrize(
    ("module", "path"), _modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_go_one_way(module: str, path: Path) -> None:
    if path.name == "__init__.py":
        outside = {name for name in _imported(path) if not name.startswith(module)}
        assert not outside, "a package imports only its own modules"
        return
    known = {name for name, _ in _modules()}
    packages = {name for name, path in _modules() if path.name == "__init__.py"}
    for imported in _imported(path) & known - packages:
        assert _level(imported) <= _level(module), (
            f"{module} imports {imported}, which is in a higher layer"
        )


@pytest.mark.parametrize("heavy", ["torch", "mlflow", "deepspeed", "pandas"])
def test_command_line_does_not_import_heavy_packages(heavy: str) -> None:
    code = (
        "import sys, pipelines.cli.main, trainer.config.run_plan; "
        f"sys.exit({heavy!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_rank_without_tracking_does_not_import_mlflow() -> None:
    """DeepSpeed imports MLflow if it is installed. MLflow can still be imported afterwards."""
    code = (
        "import sys; from trainer.distributed import env, process_group as group;"
        "group.init_distributed(env.DistEnv.from_env()); group.cleanup();"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules and 'pandas' not in "
        "sys.modules; import mlflow"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
