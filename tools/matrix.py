"""From what ``make matrix`` measured to docs/matrix.md: ``python tools/matrix.py FOLDER DOCUMENT``."""

import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""Ranks and stages."""
ACCUMULATIONS, STAGES, PRECISIONS = (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16")

HEAD = """# Every parallel configuration, tested against a single-process reference loop

Written by `make matrix` on {date}: {count:,} trainings of 20 steps, {seconds:,.0f} s on 2 cores; {passed:,} passed. The
reference (`tests/equivalence/reference_loop.py`) is plain torch: one process, fp32, `clip_grad_norm_`, AdamW, `AveragedModel` and
`cross_entropy` of torch, LARS and LAMB written out, over the same global batches in the same micro-batches. What is refused is
refused by `check_engine`, in a line that says why.

Allowed are relative differences of a step's loss of 1e-5 in the first five steps and 1e-4 in all in fp32, 2e-2 in 16 bit; final
weights likewise, and their difference as a part of the total weight update: 1% in fp32 (2% with options), 10% in 16 bit, half of
that without batch norm. The gradient norm that the engine reports in each step may differ by 1e-3 in the first five steps and
5% in all in fp32, 15% and 25% in 16 bit. AdamW and LAMB, which divide by a gradient's size, may differ by ten times as much in
losses, weights and fp32's first gradient norms, and in the total weight update by 10% in fp32 and 25% in 16 bit. A step whose
gradients overflow fp16 is skipped, at most five times; the reference then leaves its weights as they are too, and no norm is
reported.

## Without options

A cell is the largest relative difference of a step's loss over three networks: without batch norm, with it, and GoogLeNet with
auxiliary heads and dropout. {plain:,} trainings.

"""

OPTIONS = """
## With options

ResNet-8 with batch norm, two accumulation steps. A cell is the largest relative difference of a step's loss and, behind the
slash, of a step's gradient norm, over 1, 2 and 4 ranks. {presets:,} trainings. LARS and LAMB are refused but with fp32 and
ZeRO 0. In all trainings the last batch is short; with "short batches" every fifth one is, one of them to a single sample.

"""

COVERING = """
## Combinations of options

{others:,} more trainings: a covering set, in which every pair of values of ranks, stages, accumulation steps, ZeRO stage,
precision, network and every option occurs that is allowed, which is what `make test` trains; torch.compile; fp16 whose loss
scale grows; and those that write the checkpoints from which `test_resume.py` resumes on every other topology. {differ}
"""


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for ranks, stages and accumulation steps, a column for ZeRO stage and
    precision.
    """
    columns = list(itertools.product(STAGES, PRECISIONS))
    lines = [
        "| ranks | stages | steps | "
        + " | ".join(f"ZeRO {zero} {precision}" for zero, precision in columns)
        + " |"
    ]
    lines.append("|--:" * 3 + "|--:" * len(columns) + "|")
    for (ranks, stages), steps in itertools.product(TOPOLOGIES, ACCUMULATIONS):
        cells = []
        for zero, precision in columns:
            key = {
                "ranks": ranks,
                "stages": stages,
                "accumulation": steps,
                "zero": zero,
                "precision": precision,
            }
            found = [r for r in results if all(r[name] == value for name, value in key.items())]
            cells.append(f"{max(r['all20'] for r in found):.0e}" if found else "refused")
        lines.append(f"| {ranks} | {stages} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def options_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for a preset of options and pipeline stages, a column for ZeRO stage and
    precision.
    """
    columns = list(itertools.product(STAGES, PRECISIONS))
    lines = [
        "| options | stages | "
        + " | ".join(f"ZeRO {zero} {precision}" for zero, precision in columns)
        + " |"
    ]
    lines.append("|:--|--:" + "|--:" * len(columns) + "|")
    for preset, stages in itertools.product(dict.fromkeys(r["preset"] for r in results), (1, 2, 4)):
        cells = []
        for zero, precision in columns:
            key = {"preset": preset, "stages": stages, "zero": zero, "precision": precision}
            found = [r for r in results if all(r[name] == value for name, value in key.items())]
            worst = (
                [max(r[figure] for r in found) for figure in ("all20", "norms20")] if found else []
            )
            cells.append(" / ".join(f"{figure:.0e}" for figure in worst) or "refused")
        lines.append(f"| {preset} | {stages} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(folder: Path, document: Path) -> None:
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    results = [result for report in reports for result in report["results"]]
    plain = [result for result in results if result["kind"] == "plain"]
    presets = [result for result in results if result["kind"] == "preset"]
    failed = [result["deviation"] for result in results if result["deviation"]]
    facts = {
        "date": f"{datetime.date.today()}",
        "count": len(results),
        "passed": len(results) - len(failed),
        "seconds": sum(report["seconds"] for report in reports),
        "plain": len(plain),
        "presets": len(presets),
        "others": len(results) - len(plain) - len(presets),
        "differ": "\n".join(failed) or "All of them pass.",
    }
    text = (
        HEAD.format(**facts)
        + table(plain)
        + OPTIONS.format(**facts)
        + options_table(presets)
        + COVERING.format(**facts)
    )
    document.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
