"""Writes docs/studies.md and its plots from the results of ``convoy study``.

``python tools/studies.py runs/study docs``
"""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from pipelines.studies.framework.catalog import NAMES
from pipelines.studies.framework.command import heading, markdown

HEAD = """# Studies: testing common claims

Each section is a study: a question, measurements, and a verdict. The rule for the verdict was
written in the study's file (`pipelines/studies/experiments/`) before the results. A verdict applies
to the measured scale only: small networks on 28x28 images of Fashion-MNIST. A comparison of trained
networks needs at least three seeds, so a quick run decides little; it is marked as such. Bands in
plots extend from the minimum to the maximum over seeds. [The log](log.md) lists the studies that
were changed after a run, with the reasons.

```
convoy study                    # lists the studies
convoy study depth warmup       # runs two of them
convoy study all --quick        # runs all of them, at small size
```

A stopped run resumes when the command is run again. Each study writes `result.json`, `plot.png` and
`paragraph.md` to `runs/study/NAME/`. Its trainings are in MLflow, in the experiment `studies`; if
`MLFLOW_TRACKING_URI` is not set, in `runs/study/mlflow.db`.
"""


def main(runs: Path, docs: Path) -> None:
    sections, rows, missing = [], [], []
    for name in NAMES:
        file = runs / name / "result.json"
        if not file.exists():
            missing.append(name)
            continue
        picture = docs / "images" / f"study-{name}.png"
        picture.parent.mkdir(exist_ok=True)
        shutil.copyfile(runs / name / "plot.png", picture)
        result = json.loads(file.read_text(encoding="utf-8"))
        anchor = re.sub(r"[^a-z0-9 -]", "", heading(result).lower()).replace(" ", "-")
        counts = Counter(f"{claim['statement']} {claim['verdict']}" for claim in result["claims"])
        claims = "; ".join(
            f"{text} ({count})" if count > 1 else text for text, count in counts.items()
        )
        rows.append(f"| [{name}](#{anchor}) | {result['question']} | {claims} |")
        sections.append(markdown(result, f"images/{picture.name}"))
    if missing:
        sections.append(f"## Not run yet\n\nThese studies have no results: {', '.join(missing)}.")
    table = "\n".join(["| study | question | claims, by statement |", "| --- | --- | --- |", *rows])
    (docs / "studies.md").write_text(
        "\n\n".join([HEAD.rstrip(), table, *sections]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
