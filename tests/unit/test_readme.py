"""Commands, make targets, files and recipe keys that the documentation names exist."""

import re
from pathlib import Path

import pytest
import typer

from pipelines.cli.main import app
from pipelines.cli.model_table import markdown
from trainer.config.schema import known_keys
from trainer.models import list_models
from trainer.models.model_info import model_info

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_existing_commands_targets_files_and_keys(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    for words in re.findall(
        r"(?:`|^|\()convoy ([a-z]+(?: (?:up|down|env|status))?)", text, re.MULTILINE
    ):
        command = group
        for word in words.split():
            command = command.commands.get(word)  # type: ignore[attr-defined]
            assert command is not None, f"convoy {words}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^|1 )make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    if path.name.startswith("add-a"):  # such a page adds keys; tests/extending executes it
        return
    for key in re.findall(
        r"\b((?:model|data|batch|optimizer|schedule|augment|tracking|train)\.[a-z_]+)=", text
    ):
        assert key in known_keys(), key


@pytest.mark.parametrize(("path", "least"), [("README.md", 7), ("docs/models.md", 37)])
def test_model_tables_match_the_models_command(path: str, least: int) -> None:
    computed = {
        line.split(" | ")[0]: line
        for line in markdown(model_info(v.name) for v in list_models()).splitlines()
        if line.startswith("| ")
    }
    rows = [
        line
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
        and line.count("|") == computed.get(line.split(" | ")[0], "").count("|")
    ]
    assert len(rows) > least
    for row in rows:
        assert row == computed[row.split(" | ")[0]]
