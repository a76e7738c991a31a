"""Copy the committed result tables into the README, between their markers.

python benchmarks/into_readme.py           # rewrite the README
python benchmarks/into_readme.py --check   # exit 1 if it differs (a test runs this)
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from diffcache.documents import files

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKED = re.compile(r"(<!-- (results/[\w./-]+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    return MARKED.sub(lambda m: f"{m[1]}{(HERE / m[2]).read_text().strip()}\n{m[3]}", text)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true")
    check = args.parse_args().check
    text = README.read_text()
    if check:
        sys.exit(0 if filled(text) == text else f"{README.name} shows other numbers than benchmarks/results")
    files.write(README, filled(text))


if __name__ == "__main__":
    main()
