"""docs/statements.md lists the statements that the studies test, with the study of each."""

import re
from pathlib import Path

from pipelines.studies.framework.catalog import studies

PAGE = Path(__file__).parents[3] / "docs/statements.md"


def test_page_lists_each_statement_with_its_study() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    tested = {(statement, study.name) for study in studies() for statement in study.statements}
    names = {study.name for study in studies()}
    listed = {
        (row[0], cell)
        for row in rows
        if re.fullmatch(r"[A-Z]\d", row[0])
        for cell in row
        if cell in names
    }
    assert listed == tested
