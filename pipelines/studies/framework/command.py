"""``convoy study``: runs studies one after another and writes their results."""

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.studies.framework.catalog import NAMES, load, studies
from pipelines.studies.framework.runner import Runs, check_disk_space
from pipelines.studies.framework.study import Scale, Study, overall
from trainer.errors import UserError

FOLDER = Path("runs/study")


def list_studies() -> Table:
    """Return a table with a row per study."""
    table = Table("study", "statements", "question", box=None, padding=(0, 2, 0, 0))
    for study in studies():
        table.add_row(study.name, ", ".join(study.statements), study.question)
    return table


def run_studies(
    names: Sequence[str], scale: Scale, jobs: int, folder: Path = FOLDER
) -> list[dict[str, Any]]:
    """Run each study and print its verdicts; return the results.

    Raises UserError if a study fails; the remaining ones are then not run.
    """
    folder = folder.absolute()
    chosen = [load(name) for name in (NAMES if list(names) == ["all"] else names)]
    try:
        check_disk_space(folder)
        runs = Runs(folder, jobs)
        results = []
        for number, study in enumerate(chosen, start=1):
            print(f"study {number}/{len(chosen)}: {study.name}: {study.question}", flush=True)
            results.append(run_study(study, scale, runs))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    Console().print(summary_table(results))
    return results


def run_study(study: Study, scale: Scale, runs: Runs) -> dict[str, Any]:
    """Run the missing trainings, then measure and judge.

    Writes result.json, plot.png and paragraph.md to the study's folder.
    """
    started = time.monotonic()
    trainings = study.trainings(scale)
    runs.train(trainings, study.name)
    figures = json.loads(
        json.dumps(study.measure(runs, scale))
    )  # as it will be read back: keys are strings
    claims = study.judge(figures)
    outcomes = [runs.outcome(training) for training in trainings]
    result = {
        "study": study.name,
        "statements": list(study.statements),
        "question": study.question,
        "rule": study.rule,
        "verdict": overall(claims),
        "claims": [vars(claim) for claim in claims],
        "paragraph": study.paragraph(figures),
        "quick": scale.quick and study.seeded,
        "seeds": scale.seeds if study.seeded else None,
        "command": f"convoy study {study.name}"
        + (" --quick" if scale.quick and study.seeded else "")
        + (f" --seeds {scale.seeds}" if study.seeded else ""),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "training_seconds": round(sum(outcome["seconds"] for outcome in outcomes), 1),
        "wall_seconds": 0.0,
        "mlflow_runs": [outcome["mlflow_run_id"] for outcome in outcomes],
        "figures": figures,
    }
    folder = runs.folder / study.name
    folder.mkdir(parents=True, exist_ok=True)
    study.plot(figures, folder / "plot.png")
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    (folder / "paragraph.md").write_text(markdown(result) + "\n", encoding="utf-8")
    part = folder / "result.json.part"
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / "result.json")
    for claim in claims:
        print(
            f"{study.name}: {claim.statement}: {claim.verdict}: {claim.text} ({claim.why})",
            flush=True,
        )
    print(f"{study.name}: {folder / 'result.json'}, {folder / 'plot.png'}", flush=True)
    return result


def heading(result: dict[str, Any]) -> str:
    return f"{result['study']} ({', '.join(result['statements'])}): {result['verdict']}"


def markdown(result: dict[str, Any], picture: str | None = None) -> str:
    """Return a study's section of docs/studies.md; ``picture``: path of its plot."""
    kind = "quick run, only to check that it works" if result["quick"] else "full run"
    seeds = (
        f", {result['seeds']} seed{'s' if result['seeds'] > 1 else ''}" if result["seeds"] else ""
    )
    minutes = result["training_seconds"] / 60
    spent = (
        f"{minutes:.1f} min of training" if minutes else "computed and measured without the trainer"
    )
    lines = [
        f"## {heading(result)}",
        f"**{result['question']}**",
        *([f"![{result['study']}]({picture})"] if picture else []),
        result["paragraph"],
        "| statement | claim | verdict | figures |\n| --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {c['statement']} | {c['text']} | **{c['verdict']}** | {c['why']} |"
            for c in result["claims"]
        ),
        f"Rule, written before the results: {result['rule']}",
        f"`{result['command']}`: {kind}{seeds}, {spent}, {result['machine']}, {result['date']}.",
    ]
    return "\n\n".join(lines)


def summary_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a row per study that was run."""
    table = Table("study", "statements", "verdict", "training, s", box=None, padding=(0, 2, 0, 0))
    for result in results:
        table.add_row(
            result["study"],
            ", ".join(result["statements"]),
            result["verdict"],
            f"{result['training_seconds']:.0f}",
        )
    return table
