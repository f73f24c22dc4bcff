"""MkDocs hook: links from docs/ to files elsewhere in the repository.

They work in a code browser but not on the site, which holds docs/ only. The site shows the file's
name instead; a link to a file that does not exist is a warning, so that a strict build fails.
"""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.docs_links")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the source of each page."""
    folder = (DOCS / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (folder / target).resolve()
        if "://" in target or target.startswith("mailto:") or path.is_relative_to(DOCS):
            return match[0]
        if not path.exists():
            _log.warning("%s: %s does not exist", page.file.src_uri, target)
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else target
        return text if name in text else f"{text} (`{name}`)"

    return _LINK.sub(replaced, markdown)
