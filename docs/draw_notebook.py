"""Write docs/first-3x.ipynb, the first tutorial as an executed notebook.

    pip install nbformat nbclient ipykernel
    python docs/draw_notebook.py

Cells of text and of code are those of docs/tutorials/first-3x.md. Outputs are those of this run.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE, NOTEBOOK = HERE / "tutorials/first-3x.md", HERE / "first-3x.ipynb"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
DROPPED = re.compile(r"```text\n.*?```\n|<!-- [^\n]* -->\n|!\[[^\n]*\]\([^\n]*\)\n", re.DOTALL)


def cells(page: str) -> list[tuple[str, str]]:
    """Return the cells of a page as ("markdown" or "code", text), without the outputs that the page shows."""
    found = []
    for i, part in enumerate(CODE.split(page)):
        text = part.strip() if i % 2 else DROPPED.sub("", part).strip()
        if text:
            found.append(("code" if i % 2 else "markdown", text))
    return found


def main() -> None:
    import nbclient
    import nbformat

    book = nbformat.v4.new_notebook()
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    book.cells = [make[kind](text) for kind, text in cells(PAGE.read_text(encoding="utf-8"))]
    show = 'from IPython.display import Image, display\n\ndisplay(Image("pictures.png", width=512))'
    book.cells.insert(-3, make["code"](show))
    nbclient.NotebookClient(book, timeout=3600, kernel_name="python3").execute()
    for cell in book.cells:  # warnings of the machine, and progress bars, are not part of the lesson
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    main()
