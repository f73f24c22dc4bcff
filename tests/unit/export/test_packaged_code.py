"""The packaged code of a registered model: complete, and with a name that cannot clash."""

import subprocess
import sys
from pathlib import Path

from trainer.export.packaged_code import packaged_code


def test_packaged_code_predicts_in_a_program_with_another_trainer_module(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("def fit(): pass\n")
    program = """
import sys, importlib, trainer
sys.path.append(sys.argv[1])
export = importlib.import_module(sys.argv[2] + ".export.exported_model")
from pathlib import Path
import numpy as np, io
from PIL import Image
metadata = export.ModelMetadata(
    "resnet8", {"width": 4}, ["a", "b"], 2, 16, 1.0, [0.5] * 3, [0.5] * 3, True
)
export.save_model(Path("."), metadata.build(), metadata)
buffer = io.BytesIO(); Image.new("RGB", (20, 20)).save(buffer, "JPEG")
predictor = export.Predictor(Path("model.safetensors"), Path("model.json"))
assert predictor.predict([buffer.getvalue()]).shape == (1, 2)
ours = [name for name in sys.modules if name.split(".")[0] in ("trainer", "pipelines")]
assert ours == ["trainer"] and trainer.fit.__module__ == "trainer", ours
"""
    with packaged_code() as (package, serving):
        assert package.name.startswith("convoy_model_")
        for file in [serving, *package.rglob("*.py")]:
            text = file.read_text()
            assert "from trainer" not in text, file
            assert "import trainer" not in text, file
        names = {str(file.relative_to(package)) for file in package.rglob("*.py")}
        assert not names & {
            "launch.py",
            "tracking/tracker.py",
            "data/loader.py",
            "training/trainer.py",
        }, "only what prediction needs"
        command = [sys.executable, "-c", program, str(package.parent), package.name]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not package.exists()
    with packaged_code() as (again, _):
        assert again.name == package.name, "equal code has an equal name"
