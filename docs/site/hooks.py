"""What `mkdocs build` does besides: pages made of the code, and files outside docs/ that the documents link to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [os.fspath(Path(__file__).resolve().parents[2]), os.fspath(Path(__file__).parent)]

import references
from links import DOCS, OUTSIDE, REPOSITORY, place, rewritten, targets
from mkdocs.structure.files import File


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages, and what is linked outside docs/, and what that links to."""
    for name, text in references.pages().items():
        files.append(File.generated(config, name, content=text))
    waiting = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for target in targets((REPOSITORY / path).read_text("utf-8"), path) - seen:
            seen.add(target)
            if target.endswith(".md"):
                waiting.append(target)
            if not target.startswith(f"{DOCS}/"):
                source = os.fspath(REPOSITORY / target)
                files.append(File.generated(config, place(target), abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page as the site has them; a made page has them already."""
    uri = page.file.src_uri
    if uri.startswith(f"{OUTSIDE}/"):
        return rewritten(markdown, uri.removeprefix(f"{OUTSIDE}/"))
    return markdown if page.file.generated_by else rewritten(markdown, f"{DOCS}/{uri}")
