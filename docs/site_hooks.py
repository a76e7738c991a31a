"""Hooks of the documentation site: generated pages, and links to files outside of ``docs/``.

``mkdocs.yml`` names this file. The pages in ``PAGES`` are made from the installed package when the site is built.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import reference_pages

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\])\(([^)\s#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod):<code>~?(?:diffcache\.)?([^<]*)</code>")
PAGE = re.compile(r"\bdocs/([\w/-]+)\.md\b(?!\")")

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the pictures of ``benchmarks/results``."""
    for path, page in reference_pages.PAGES.items():
        files.append(File.generated(config, path, content=page()))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave ``docs/`` into links to the repository."""
    return LINK.sub(lambda found: outside(found, page.file.src_uri, config["repo_url"]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show references of docstrings as code (``:func:`accelerate```) or as links (``docs/serving.md``)."""
    if not page.file.src_uri.startswith("reference/api/"):
        return html
    html = ROLE.sub(r"<code>\1</code>", html)
    pages = {one.src_uri.removesuffix(".md"): one for one in files.documentation_pages()}
    return PAGE.sub(
        lambda found: (
            f'<a href="{pages[found[1]].url_relative_to(page.file)}">{found[0]}</a>' if found[1] in pages else found[0]
        ),
        html,
    )


def outside(found: re.Match[str], source: str, repository: str) -> str:
    """Return a link of the page ``source``, with the address in the repository if it leaves ``docs/``."""
    picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if "://" in target or not target.startswith("../"):
        return found[0]
    depth = len(PurePosixPath(source).parents) - 1
    parts = target.split("/")
    ups = next(n for n, part in enumerate(parts) if part != "..")
    if ups <= depth:
        return found[0]
    path = "/".join(parts[ups:])
    if not (ROOT / path).exists():
        log.warning(f"{source} links to {path}, which is not in the repository")
        return found[0]
    if picture and path.startswith("benchmarks/results/"):
        return f"![{text[1:-1]}]({'../' * depth}results/{PurePosixPath(path).name})"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{picture}{text}({repository}/{kind}/main/{path}{anchor})"
