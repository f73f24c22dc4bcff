"""The guide's study, against the formula of the paper that it tests."""

import json
from pathlib import Path

import pytest
from guide import follow_guide, run_python
from PIL import Image


def test_the_study_runs_and_its_figures_follow_the_formula(tmp_path: Path) -> None:
    tree, results = tmp_path / "tree", tmp_path / "results"
    follow_guide("add-a-study", tree)
    convoy = ("-m", "pipelines.cli", "study")
    assert "initialization" in run_python(tree, *convoy)
    run_python(tree, *convoy, "initialization", "--dir", results)
    result = json.loads((results / "initialization/result.json").read_text())
    assert (result["verdict"], result["statements"], result["seeds"]) == ("borne out", ["N1"], 3)
    # He et al. 2015, equation 8: a ReLU layer multiplies the mean square by fan-in x variance / 2
    for name, factor in (("he", 1.0), ("xavier", 0.5)):
        for squares in result["figures"][name]:
            assert len(squares) == 30
            per_layer = (squares[-1] / squares[0]) ** (1 / 29)
            assert per_layer == pytest.approx(factor, rel=0.1)
    with Image.open(results / "initialization/plot.png") as plot:
        assert plot.width > 100

    judge = (
        "from pipelines.studies.framework.catalog import load\n"
        "equal = {'he': [[1.0, 1.0]] * 3, 'xavier': [[1.0, 1.0]] * 3}\n"
        "print(load('initialization').judge(equal)[0].verdict)"
    )
    assert run_python(tree, "-c", judge).strip() == "not borne out"
