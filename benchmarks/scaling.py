"""Linear scaling and warmup: does batch 512 at 8 times the rate learn what batch 64 learns (Goyal et al. 2017, figures 2 and 3)?

    python benchmarks/scaling.py [--seeds 3] [--jobs 2] [--json FILE] [--plot FILE] [--dir runs/scaling] [--quick]

Six recipes, `trainer/recipes/warmup-*.yaml`, trained on Fashion-MNIST by `convoy train --procs 1`, with one thread each and
``--jobs`` of them at a time; a seed is of the initial weights and of the sample order. The runs write to an MLflow database
file, from where every step's loss is read; no server is needed. A run that is there already, of the same configuration, is not
made again, so that an interrupted experiment goes on. ``--quick`` makes the first 8,192 samples of one seed, to see that all works.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.demo import find_fashion
from trainer.config import RunConfig, load_config
from trainer.tracking import configure_mlflow

SLOW, FAST = "0.025 for 64 (0.1 for 256)", "0.1 for 64 (0.4 for 256)"
GROUPS = {
    SLOW: ("warmup-64", "warmup-512", "warmup-512-unscaled"),
    FAST: ("warmup-64-fast", "warmup-512-fast", "warmup-512-cold"),
}
RECIPES = [recipe for recipes in GROUPS.values() for recipe in recipes]
CLAIMS = (
    ("warmup-512", "warmup-64", "the same"),
    ("warmup-512", "warmup-512-unscaled", "better"),
    ("warmup-512-fast", "warmup-64-fast", "the same"),
    ("warmup-512-fast", "warmup-512-cold", "better"),
)
_COLOURS = ("#000000", "#0072B2", "#D55E00")  # Okabe and Ito's black, blue, vermilion: told apart by colour-blind readers
_QUICK_SAMPLES = 8192


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    recipe: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def config(self) -> RunConfig:
        return load_config(self.recipe, self.overrides)

    def is_done(self) -> bool:
        """Whether it was run with the configuration that it has now."""
        try:
            return bool(self.result()) and RunConfig.model_validate_json((self.folder / "config.json").read_text()) == self.config
        except (OSError, ValueError):
            return False

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result


@dataclass(frozen=True)
class Row:
    """A recipe over its seeds. ``losses`` and ``rates``: of each seed and step; ``top1``: of each seed, percent."""

    config: RunConfig
    losses: np.ndarray  # float64 [seeds, steps]
    rates: np.ndarray  # float64 [seeds, steps]
    top1: list[float]

    def samples(self) -> np.ndarray:
        """Seen after each step."""
        return self.config.batch.global_size * np.arange(1, self.losses.shape[1] + 1)

    def epoch_steps(self) -> int:
        return self.losses.shape[1] // (self.config.train.epochs or 1)

    def figures(self) -> dict[str, Any]:
        return {
            "batch": self.config.batch.global_size,
            "peak_rate": float(self.rates.max()),
            "warmup_epochs": self.config.schedule.warmup_epochs,
            "top1_percent": [round(value, 2) for value in self.top1],
            "top1_mean": round(statistics.mean(self.top1), 3),
            "top1_deviation": round(statistics.stdev(self.top1), 3) if len(self.top1) > 1 else None,
            "loss_first_epoch": round(float(self.losses[:, : self.epoch_steps()].mean()), 4),
            "loss_last_epoch": round(float(self.losses[:, -self.epoch_steps() :].mean()), 4),
        }


def pack(folder: Path) -> None:
    """Fashion-MNIST as shards, where it is not there yet."""
    if (folder / "train" / "index.json").exists() and (folder / "val" / "index.json").exists():
        return
    source = find_fashion()
    if source is None:
        sys.exit("scaling: Fashion-MNIST cannot be had: neither installed nor to be fetched with apt")
    subprocess.run([sys.executable, "-m", "pipelines.cli", "pack", str(source), str(folder), "--shards", "12"], check=True)


def make_runs(folder: Path, data: Path, uri: str, seeds: int, quick: bool) -> list[Run]:
    """Seed by seed, so that an experiment that is cut short has whole seeds."""
    runs = []
    for seed in range(seeds):
        for recipe in RECIPES:
            output = folder / f"{recipe}-{seed}"
            overrides = [
                f"name={output.name}", f"data.train={data}/train", f"data.val={data}/val", f"data.seed={seed}",
                f"train.seed={seed}", f"train.output_dir={output}", f"tracking.uri={uri}", "tracking.experiment=scaling",
            ]  # fmt: skip
            if quick:
                overrides.append(f"train.max_steps={_QUICK_SAMPLES // load_config(recipe).batch.global_size}")
            runs.append(Run(recipe, seed, output, overrides))
    return runs


def run_all(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not done, ``jobs`` at a time; ends all of them where one fails or this process is ended."""
    todo = [run for run in runs if not run.is_done()]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are done", flush=True)
    active: dict[str, tuple[subprocess.Popen[bytes], Run, float]] = {}
    try:
        while todo or active:
            while todo and len(active) < jobs:
                run = todo.pop(0)
                active[run.folder.name] = (_start(run), run, time.monotonic())
            time.sleep(0.5)
            for name, (process, run, started) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[name]
                if process.returncode or not run.is_done():
                    sys.exit(f"scaling: {name} ended with exit code {process.returncode}; see {run.folder}.log")
                print(f"{name}: top1 {run.result()['top1']:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    finally:
        for process, _, _ in active.values():
            process.terminate()
        for process, _, _ in active.values():
            process.wait()


def _start(run: Run) -> subprocess.Popen[bytes]:
    shutil.rmtree(run.folder, ignore_errors=True)
    with run.folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "train", run.recipe, "--procs", "1", *run.overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def open_mlflow(uri: str, artifacts: Path) -> Any:
    """A client; makes the database and the experiment before two runs would do it at once."""
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if client.get_experiment_by_name("scaling") is None:
        client.create_experiment("scaling", artifact_location=artifacts.as_uri())
    return client


def read_rows(client: Any, runs: Sequence[Run]) -> dict[str, Row]:
    """Each recipe's curves and results. Ends the program where MLflow misses a loss."""
    rows = {}
    for recipe in RECIPES:
        own = [run for run in runs if run.recipe == recipe]
        results = [run.result() for run in own]
        for run, result in zip(own, results, strict=True):
            if len(found := _history(client, result, "loss")) != result["steps"]:
                told = f"{run.folder}: MLflow has {len(found)} of {result['steps']} losses; send it the rest with"
                sys.exit(f"scaling: {told} MLFLOW_TRACKING_URI={client.tracking_uri} convoy sync {run.folder}/tracking.jsonl")
        rows[recipe] = Row(
            config=own[0].config,
            losses=np.array([_history(client, result, "loss") for result in results]),
            rates=np.array([_history(client, result, "learning_rate") for result in results]),
            top1=[100 * result["top1"] for result in results],
        )
    return rows


def _history(client: Any, result: Mapping[str, Any], key: str) -> list[float]:
    points = client.get_metric_history(result["mlflow_run_id"], key)
    return [value for _, value in sorted((point.step, point.value) for point in points)]


def judge(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The claims against what was measured. ``better`` holds where it is so in every seed, ``the same`` where the differences have
    both signs; equals would have the same sign in three seeds out of three by chance one time in four."""
    verdicts = []
    for one, other, claim in CLAIMS:
        differences = [a - b for a, b in zip(rows[one].top1, rows[other].top1, strict=True)]
        holds = min(differences) > 0 if claim == "better" else min(differences) <= 0 <= max(differences)
        verdicts.append(
            {
                "claim": f"{one} is {'the same as' if claim == 'the same' else 'better than'} {other}",
                "differences_points": [round(value, 2) for value in differences],
                "mean_difference": round(statistics.mean(differences), 3),
                "holds": holds,
            }
        )
    return verdicts


def print_tables(title: str, rows: Mapping[str, Row], verdicts: Sequence[Mapping[str, Any]]) -> None:
    """The rows from the best top-1 to the worst, and the claims."""
    console = Console(width=140)
    columns = ("recipe", "batch", "peak rate", "warmup, epochs", "top-1, %", "each seed", "loss, first epoch", "loss, last epoch")
    table = Table(*columns, title=title, title_justify="left")
    for recipe, row in sorted(rows.items(), key=lambda item: -statistics.mean(item[1].top1)):
        f = row.figures()
        spread = "" if f["top1_deviation"] is None else f" ± {f['top1_deviation']:.2f}"
        seeds = ", ".join(f"{value:.2f}" for value in row.top1)
        cells = (f["batch"], f"{f['peak_rate']:.4g}", f"{f['warmup_epochs']:.4g}", f"{f['top1_mean']:.2f}{spread}", seeds)
        table.add_row(recipe, *map(str, cells), f"{f['loss_first_epoch']:.4f}", f"{f['loss_last_epoch']:.4f}")
    console.print(table)
    claims = Table("claim", "difference, points", "each seed", "holds", title="top-1, seed by seed", title_justify="left")
    for verdict in verdicts:
        seeds = ", ".join(f"{value:+.2f}" for value in verdict["differences_points"])
        claims.add_row(verdict["claim"], f"{verdict['mean_difference']:+.2f}", seeds, "yes" if verdict["holds"] else "no")
    console.print(claims)


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Of the last ``width`` values along the last axis, of fewer at the beginning."""
    sums = np.cumsum(values, axis=-1)
    counts = np.minimum(np.arange(1, values.shape[-1] + 1), width)
    sums[..., width:] -= sums[..., :-width].copy()
    return sums / counts


def plot(rows: Mapping[str, Row], title: str, file: Path) -> None:
    """Training loss against samples seen: a row of panels for each rate, the whole run on the left, its beginning on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(13, 8.5), constrained_layout=True, width_ratios=(1.35, 1))
    for (rate, recipes), (whole, first) in zip(GROUPS.items(), grid, strict=True):
        for recipe, colour in zip(recipes, _COLOURS, strict=True):
            _draw(whole, rows[recipe], 8192, rows[recipe].losses.shape[1], colour, recipe)
            _draw(first, rows[recipe], 2048, rows[recipe].epoch_steps(), colour, recipe)
        whole.set_title(f"Rate {rate}: the whole run, mean of the last 8,192 samples")
        first.set_title("Its first epoch, mean of the last 2,048 samples")
        whole.legend(frameon=False)
        for axes in (whole, first):
            axes.set(xlabel="samples seen (thousands)", ylabel="training loss, cross-entropy (nats)", yscale="log")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, which="both")
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw(axes: Any, row: Row, window: int, steps: int, colour: str, recipe: str) -> None:
    """The first ``steps``: mean over the seeds, and a band from the least to the greatest."""
    smooth = trailing_mean(row.losses[:, :steps], max(1, window // row.config.batch.global_size))
    seen = row.samples()[:steps] / 1e3
    axes.plot(seen, smooth.mean(axis=0), color=colour, linewidth=1.4, label=f"{recipe}: top-1 {statistics.mean(row.top1):.2f}%")
    axes.fill_between(seen, smooth.min(axis=0), smooth.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="docs/images/scaling.png when not given; in --dir with --quick")
    parser.add_argument("--dir", type=Path, default=Path("runs/scaling"), help="where data, runs and MLflow's database are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    base = options.dir.absolute()
    folder = base / "quick" if options.quick else base
    folder.mkdir(parents=True, exist_ok=True)
    pack(base / "fashion-mnist")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = open_mlflow(uri, folder / "artifacts")
    runs = make_runs(folder, base / "fashion-mnist", uri, 1 if options.quick else options.seeds, options.quick)
    run_all(runs, options.jobs)
    rows = read_rows(client, runs)
    verdicts = judge(rows)
    seeds = len(runs) // len(RECIPES)
    epochs = "8,192 samples" if options.quick else f"{rows['warmup-64'].config.train.epochs} epochs"
    made = date.fromtimestamp(max((run.folder / "result.json").stat().st_mtime for run in runs))
    title = f"ResNet-8, Fashion-MNIST, {epochs}, {seeds} seed{'s' if seeds > 1 else ''}, {made}"
    print_tables(title, rows, verdicts)
    picture = options.plot or (folder if options.quick else Path(__file__).parents[1] / "docs" / "images") / "scaling.png"
    plot(rows, title, picture)
    print(f"picture: {picture}")
    if options.json:
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        figures = {recipe: row.figures() for recipe, row in rows.items()}
        options.json.write_text(
            json.dumps({"title": title, "machine": machine, "rows": figures, "claims": verdicts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
