"""Write docs/studies.md and its pictures from what `convoy study` left: python tools/studies.py
runs/study docs.
"""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from pipelines.studies.framework.catalog import NAMES
from pipelines.studies.framework.command import heading, markdown

HEAD = """# The statements, put to the test

Each section is a study: a question, what was measured, and a verdict by a rule that stands in the study's file
(`pipelines/studies/`) since before the results. A verdict is what was measured, here and on this scale: small networks on
28x28 images of Fashion-MNIST. Where trained networks are compared, fewer than three seeds decide nothing, so that a quick
run says little; it is marked as such. Bands go from the least seed to the greatest. Where a study was changed after it had
been run, [the log](log.md) says how and why.

```
convoy study                    # what there is
convoy study depth warmup       # some of them
convoy study all --quick        # every one in small
```

A run that was stopped goes on where it was. Each leaves `result.json`, `plot.png` and `paragraph.md` in `runs/study/NAME/`,
and its trainings in MLflow (experiment `studies`; `runs/study/mlflow.db` where `MLFLOW_TRACKING_URI` names no server).
"""


def main(runs: Path, docs: Path) -> None:
    sections, rows, owed = [], [], []
    for name in NAMES:
        file = runs / name / "result.json"
        if not file.exists():
            owed.append(name)
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
    if owed:
        sections.append(
            f"## Not run yet\n\n{', '.join(owed)}: written and tested, and still to be run whole."
        )
    table = "\n".join(["| study | question | claims, by statement |", "| --- | --- | --- |", *rows])
    (docs / "studies.md").write_text(
        "\n\n".join([HEAD.rstrip(), table, *sections]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
