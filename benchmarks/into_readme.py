"""Copy the committed result tables into the README and the pages of the documentation, between their markers.

python benchmarks/into_readme.py           # rewrite the pages
python benchmarks/into_readme.py --check   # exit 1 if one differs (a test runs this)
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from diffcache.documents import files

HERE = Path(__file__).parent
PAGES = [
    page
    for page in (
        HERE.parent / "README.md",
        HERE.parent / "docs/benchmarks.md",
        HERE.parent / "docs/explanation/auto.md",
        HERE.parent / "docs/language-models.md",
    )
    if page.exists()
]
MARKED = re.compile(r"(<!-- (results/[\w./-]+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADING = re.compile(r"^(#+ )", re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)]+)\)")  # to a file


def filled(text: str, page: Path) -> str:
    """Return the text of a page with the current tables.

    Headings of a table's file go two levels down, below those of the page. Links start at the folder of the page.
    """
    return MARKED.sub(lambda m: f"{m[1]}{_moved(_lowered((HERE / m[2]).read_text().strip()), page)}\n{m[3]}", text)


def _lowered(table: str) -> str:
    return HEADING.sub(r"##\1", table)


def _moved(table: str, page: Path) -> str:
    """Return a table with links that start at the folder of a page, not at the folder of the results."""
    folder = page.parent.resolve()
    return LINK.sub(
        lambda m: f"]({Path(os.path.relpath(HERE.resolve() / 'results' / m[1], folder)).as_posix()})", table
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true")
    check = args.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if not check:
            files.write(page, filled(text, page))
        elif filled(text, page) != text:
            sys.exit(f"{page.name} shows other numbers than benchmarks/results")


if __name__ == "__main__":
    main()
