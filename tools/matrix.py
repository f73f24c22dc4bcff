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

HEAD = """# Every way to spread a training, against one plain loop

Written by `make matrix` on {date}: {count} trainings of 20 steps, {seconds:,.0f} s on 2 cores; {passed} passed. A cell is the
largest relative difference of a step's loss from a plain fp32 torch loop in one process, over 20 steps and three networks: without
batch norm, with it, and GoogLeNet with auxiliary heads and dropout. Allowed are 1e-5 in the first five steps and 1e-4 in all in
fp32, 2e-2 in 16 bit; final weights likewise, and how far they are from the loop's as a part of the way that they have come: 1% in
fp32, 10% in 16 bit. A step whose gradients overflow fp16 is skipped, at most five times; the loop then leaves its weights as they
are too. What is refused is refused by `check_engine`, in a line that says why.

"""


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for ranks, stages and accumulation steps, a column for ZeRO stage and precision."""
    columns = list(itertools.product(STAGES, PRECISIONS))
    lines = ["| ranks | stages | steps | " + " | ".join(f"ZeRO {zero} {precision}" for zero, precision in columns) + " |"]
    lines.append("|--:" * 3 + "|--:" * len(columns) + "|")
    for (ranks, stages), steps in itertools.product(TOPOLOGIES, ACCUMULATIONS):
        cells = []
        for zero, precision in columns:
            key = {"ranks": ranks, "stages": stages, "accumulation": steps, "zero": zero, "precision": precision}
            found = [r for r in results if all(r[name] == value for name, value in key.items())]
            cells.append(f"{max(r['all20'] for r in found):.0e}" if found else "refused")
        lines.append(f"| {ranks} | {stages} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(folder: Path, document: Path) -> None:
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    results = [result for report in reports for result in report["results"] if "options" not in result]
    facts = {
        "date": f"{datetime.date.today()}",
        "count": len(results),
        "passed": sum(not result["deviation"] for result in results),
        "seconds": sum(report["seconds"] for report in reports),
    }
    document.write_text(HEAD.format(**facts) + table(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
