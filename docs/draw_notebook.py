"""Write docs/first-3x.ipynb, the first tutorial as an executed notebook.

    pip install nbformat nbclient ipykernel
    OMP_NUM_THREADS=1 python docs/draw_notebook.py

Cells of text and of code are those of docs/tutorials/first-3x.md. ``SHOWN`` adds cells that display a value as a
notebook does. The outputs are those of this run.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PAGE, NOTEBOOK = HERE / "tutorials/first-3x.md", HERE / "first-3x.ipynb"
SITE = "https://diffcache.github.io/diffcache/"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
DROPPED = re.compile(
    r"```text\n.*?```\n|<!-- [^\n]* -->\n|!\[[^\n]*\]\([^\n]*\)\n|[^\n]*\(\.\./first-3x\.ipynb\)[^\n]*\n\n", re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\.md(#[^)]*)?\)")

# Text in a code block of the page -> the code of the cell after it, which only the notebook has.
SHOWN = {
    "print(schedule)": "schedule",
    "schedule.save(": "diffcache.report(pipe)",
    "save_grid(": 'from IPython.display import Image\n\nImage("pictures.png", width=512)',
}


def cells(page: str) -> list[tuple[str, str]]:
    """Return the cells of a page as ("markdown", "code" or "shown", text), without the outputs that the page shows."""
    found = []
    for i, part in enumerate(CODE.split(page)):
        text = part.strip() if i % 2 else LINK.sub(on_the_site, DROPPED.sub("", part)).strip()
        if text:
            found.append(("code" if i % 2 else "markdown", text))
        if i % 2:
            found += [("shown", code) for mark, code in SHOWN.items() if mark in part]
    return found


def on_the_site(link: re.Match[str]) -> str:
    """Return a link of the tutorial as one to the documentation site, so that it works wherever the notebook is."""
    page = (PAGE.parent / link[1]).resolve().relative_to(HERE.resolve()).as_posix()
    return f"]({SITE}{page}/{link[2] or ''})"


def main() -> None:
    import nbclient
    import nbformat

    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # run this checkout, not an installed release
    book = nbformat.v4.new_notebook()
    for number, (kind, text) in enumerate(cells(PAGE.read_text(encoding="utf-8"))):
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        book.cells.append(new(text, id=f"cell-{number}"))
    with tempfile.TemporaryDirectory() as folder:
        run = {"metadata": {"path": folder}}
        nbclient.NotebookClient(book, timeout=3600, kernel_name="python3", resources=run).execute()
    for cell in book.cells:  # warnings of the machine, progress bars and times of execution are not part of the lesson
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    main()
