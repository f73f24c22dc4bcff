"""Writes docs/reference/ from the code: the command line, recipe keys and exit codes; and the table
of the networks in docs/models.md.

    python tools/reference.py [--check]

``--check`` writes nothing and ends with 1 if a page is not current.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import TypeAdapter

from pipelines.cli.main import app
from pipelines.cli.model_table import markdown_table, top5_sources
from pipelines.cli.recipe_info import recipe_keys
from trainer import errors
from trainer.models import list_models
from trainer.models.model_info import model_info
from trainer.progress.progress_record import (
    LINE_PREFIX,
    PROGRESS_FILE,
    PROGRESS_LOG_VARIABLE,
    ProgressRecord,
)

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "reference"
NOTE = "<!-- Written by tools/reference.py; do not edit. -->\n\n"
EXIT_CODES = {
    "EXIT_BUG": "A bug in Convoy; the traceback is on stderr. Never retried.",
    "EXIT_USER": "An error that only the user can fix; one line per error on stderr. Never "
    "retried.",
    "EXIT_PREEMPTED": "Stopped by SIGTERM after a checkpoint. A restarted job resumes from it.",
    "EXIT_RETRY": "A rank, a node or a service was lost. A restarted job resumes from the last "
    "checkpoint.",
}


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below ``command`` with its full name, in the order of `--help`."""
    for child_name, child in getattr(command, "commands", {}).items():
        if child.hidden:
            continue
        if hasattr(child, "commands"):
            yield from commands(child, f"{name} {child_name}")
        else:
            yield f"{name} {child_name}", child


def usage(name: str, command: Any) -> str:
    parts = [name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
            parts.append(word if parameter.required else f"[{word}]")
    return " ".join([*parts, "[OPTIONS]"])


def cli_page() -> str:
    lines = [
        "# Command line",
        "",
        "Exit codes are the same for every command: see [exit codes](exit-codes.md).",
    ]
    for name, command in commands(typer.main.get_command(app), "convoy"):
        lines += [
            "",
            f"## {name}",
            "",
            f"```\n{usage(name, command)}\n```",
            "",
            (command.help or "").strip(),
        ]
        rows = []
        for parameter in command.params:
            if parameter.name == "help" or getattr(parameter, "hidden", False):
                continue
            if parameter.param_type_name == "argument":
                names = parameter.name.upper()
            else:
                names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            default = parameter.default
            if parameter.name in ("workers", "jobs"):
                default = "number of processors"
            elif callable(default) or default is None or default is False or parameter.required:
                default = ""
            shown = getattr(default, "value", default)
            rows.append(f"| `{names}` | {cell(shown)} | {cell(parameter.help or '')} |")
        if rows:
            lines += ["", "| argument or option | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def recipe_page() -> str:
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a YAML file; `key=value` on the command line overrides a key. "
        "`convoy recipe keys [PREFIX]` prints this table, `convoy recipe schema` a JSON schema for "
        "editors.",
    ]
    section = None
    for key in recipe_keys():
        head = key.key.rpartition(".")[0] or "run"
        if head != section:
            lines += ["", f"## {head}", "", "| key | type | default | |", "|---|---|---|---|"]
            section = head
        default = (
            "required" if key.required else ("" if key.default is None else f"`{key.default}`")
        )
        lines.append(
            f"| `{key.key}` | {cell(key.type)} | {cell(default)} | {cell(key.description)} |"
        )
    return "\n".join(lines) + "\n"


def exit_code_page() -> str:
    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes.keys() == EXIT_CODES.keys(), "describe every exit code"
    lines = [
        "# Exit codes",
        "",
        "The training operator's `ExitCode` restart policy recreates a pod that ends with 128 or "
        "more.",
        "",
        "| code | constant | meaning |",
        "|---|---|---|",
        "| 0 | | Done. |",
        *(
            f"| {code} | `{name}` | {EXIT_CODES[name]} |"
            for name, code in sorted(codes.items(), key=lambda item: item[1])
        ),
        "",
        "Another signal that ends a rank gives 128 plus its number, as in a shell: 130 for Ctrl-C, "
        "129 for SIGHUP.",
    ]
    return "\n".join(lines) + "\n"


def progress_page() -> str:
    schema = TypeAdapter(ProgressRecord).json_schema()
    lines = [
        "# Progress record",
        "",
        f"A run publishes its progress for programs as `{PROGRESS_FILE}` in `train.output_dir`:",
        "one JSON object, replaced atomically at each change of the phase, and at most once per",
        "second otherwise.",
        "",
        f"If the environment variable `{PROGRESS_LOG_VARIABLE}` is 1, as in the pods of a job, the",
        "same object is printed to the log at each change of the phase, and at most once per 10",
        f"seconds otherwise, in lines that start with `{LINE_PREFIX.strip()}`.",
        "",
        "Other lines of the log are for people and may change. Readers must ignore fields that",
        "they do not know. Texts contain no credentials and no control characters. A value",
        "that is not known is null.",
        "",
        "| field | type | |",
        "|---|---|---|",
    ]
    for name, node in schema["properties"].items():
        types = [option["type"] for option in node.get("anyOf", [node])]
        lines.append(f"| `{name}` | {' or '.join(types)} | {cell(node['description'])} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "cli.md": cli_page,
    "recipe-keys.md": recipe_page,
    "exit-codes.md": exit_code_page,
    "progress.md": progress_page,
}


def models_page() -> str:
    """The page as it is, with new tables between the comments that mark them."""
    entries = [model_info(spec.name) for spec in list_models()]
    sources = [
        "| models | source |",
        "|---|---|",
        *(f"| {', '.join(names)} | {source} |" for source, names in top5_sources(entries).items()),
    ]
    tables = {"networks": markdown_table(entries), "sources": "\n".join(sources)}
    text = (DOCS / "models.md").read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by tools/reference.py -->\n", f"<!-- end of {name} -->"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


def main() -> None:
    pages = {FOLDER / name: NOTE + page() for name, page in PAGES.items()}
    pages[DOCS / "models.md"] = models_page()
    if "--check" not in sys.argv:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for path, text in pages.items():
            path.write_text(text)
        return
    stale = [p.name for p, text in pages.items() if not p.exists() or p.read_text() != text]
    if stale:
        sys.exit(f"docs: {', '.join(stale)} not current; run python tools/reference.py")


if __name__ == "__main__":
    main()
