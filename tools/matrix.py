"""Writes docs/matrix.md from the measurements of ``make matrix``.

``python tools/matrix.py FOLDER DOCUMENT``
"""

import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""Ranks and pipeline stages."""
ACCUMULATIONS, STAGES, PRECISIONS = (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16")

HEAD = """# Every parallel configuration, tested against a single-process reference loop

`make matrix` wrote this page on {date}: {count:,} trainings of 20 steps each, {seconds:,.0f} s on 2
cores; {passed:,} passed. The reference (`tests/equivalence/reference_loop.py`) is plain torch in
one process and fp32: torch's `clip_grad_norm_`, AdamW, `AveragedModel` and `cross_entropy`, and
LARS and LAMB written out, over the same global batches divided into the same micro-batches.
"refused" marks configurations that `validate_parallelism` rejects, with a message that gives the
reason.

Limits, as relative differences from the reference:

| quantity | fp32 | bf16 and fp16 |
|---|--:|--:|
| loss of a step, first five steps | 1e-5 | 2e-2 |
| loss of a step, all steps | 1e-4 | 2e-2 |
| final weights | 1e-4 | 2e-2 |
| final weights, relative to the total weight update (half of it without batch norm) \
| 1% (2% with options) | 10% |
| gradient norm, first five steps | 1e-3 | 15% |
| gradient norm, all steps | 5% | 25% |

With AdamW and LAMB, which divide by the size of a gradient, the limits of losses, weights and the
first gradient norms in fp32 are ten times as large, and that of the total weight update is 10% in
fp32 and 25% in 16 bit. A step whose gradients overflow fp16 is skipped, at most five times; the
reference then skips it too, and no gradient norm is reported.

## Without options

Each cell shows the largest relative difference of a step's loss over three networks: without batch
norm, with batch norm, and GoogLeNet with auxiliary heads and dropout. {plain:,} trainings.

"""

OPTIONS = """
## With options

ResNet-8 with batch norm and two accumulation steps. Each cell shows the largest relative difference
of a step's loss and, after the slash, of a step's gradient norm, over 1, 2 and 4 ranks. {presets:,}
trainings. LARS and LAMB need fp32 and ZeRO 0. The last batch of every training is short; with
"short batches" every fifth one is, down to a single sample.

"""

COVERING = """
## Combinations of options

{others:,} more trainings: a covering set, which `make test` also trains and in which every allowed
pair of values of ranks, stages, accumulation steps, ZeRO stage, precision, network and options
occurs; `torch.compile`; fp16 with a growing loss scale; and the trainings that write the
checkpoints from which `test_resume_grid.py` resumes on every other topology. {differ}
"""


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results without options.

    It has one row per ranks, stages and accumulation steps, and one column per ZeRO stage and
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
    """Return a Markdown table of the results with options.

    It has one row per preset of options and pipeline stages, and one column per ZeRO stage and
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
