"""Words that make sentences hard to read do not occur in the package, the documents and the tests.

``python tests/contracts/test_plain_english.py [folder]`` prints the counts of a checkout.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]

# Pattern -> what to write instead.
WORDS = {
    "beside": "next to, in addition to, compared with",
    "tell|tells|told|telling": "state, name, show, pass, distinguish",
    "whatever": "any, regardless of",
    "nobody|nobody's|somebody|somebody's": "name the user, the caller or the object",
    "of (?:its|their|his) own": "separate, own, another",
    "what (?:it|they) ends? at": "the final state",
    "the house": "this package",
    "room|rooms": "package, memory",
    "stranger|strangers": "another object, another user",
    "wears|wear": "has",
    "lesson|lessons": "result",
    "heard": "received, seen",
    "(?:is|are|was|were) said": "is stated, is given",
    "(?<!there )is no(?! longer)": "is not a, has no",
    "whose": "with, of which; or two sentences",
}

# The most that may occur, where the answer is not zero. A number here may fall and never rises.
LIMITS: dict[str, dict[str, int]] = {"package": {"whose": 67}, "documents": {"whose": 30}, "tests": {"whose": 41}}

# Text around a listed word that makes it a name of the code.
ALLOWED: tuple[str, ...] = ()

PROSE = {
    "documents": (
        *("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/*/*.md", "docs/*/*/*.md"),
        *("benchmarks/*.md", "benchmarks/*/README.md", "examples/*.md", "examples/*/README.md"),
    ),
    "package": ("diffcache/**/*.py",),
    "tests": ("tests/**/*.py",),
}


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            if docstring := ast.get_docstring(node, clean=False):
                yield node.body[0].lineno, docstring


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string constant, including docstrings and the text in f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of the name of each test."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def sentences(part: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of all prose in a file."""
    text = path.read_text(encoding="utf-8")
    if part == "documents":
        yield from enumerate(text.splitlines(), 1)
        return
    tree = ast.parse(text)
    yield from comments(text)
    yield from strings(tree) if part == "package" else (*docstrings(tree), *names(tree))


def found(root: Path, part: str) -> dict[str, list[str]]:
    """Return where each pattern occurs, as ``file:line: text``."""
    places: dict[str, list[str]] = {}
    patterns = {word: re.compile(rf"\b(?:{word})\b", re.IGNORECASE) for word in WORDS}
    files = sorted({path for pattern in PROSE[part] for path in root.glob(pattern)})
    for path in files:
        if path.name == Path(__file__).name:
            continue  # it holds the list
        for line, text in sentences(part, path):
            for word, pattern in patterns.items():
                for match in pattern.finditer(text):
                    excerpt = " ".join(text[max(0, match.start() - 40) : match.end() + 30].split())
                    if not any(allowed in excerpt for allowed in ALLOWED):
                        places.setdefault(word, []).append(f"{path.relative_to(root)}:{line}: {excerpt}")
    return places


def excess(root: Path, part: str) -> list[str]:
    """Return a line for each pattern that occurs more often than its limit, with its places."""
    limits = LIMITS[part]
    return [
        f"{word!r} occurs {len(places)} times; at most {limits.get(word, 0)} are allowed. Write: {WORDS[word]}.\n  "
        + "\n  ".join(places)
        for word, places in found(root, part).items()
        if len(places) > limits.get(word, 0)
    ]


@pytest.mark.parametrize("part", PROSE)
def test_prose_has_no_listed_word(part: str) -> None:
    faults = excess(ROOT, part)
    assert not faults, "\n".join(faults)


PLANTED = {
    "package": ("diffcache/planted.py", 'raise ValueError(f"{1} stands beside it")\n'),
    "package, a comment": ("diffcache/planted.py", "x = 1  # nobody reads it\n"),
    "package, a docstring": ("diffcache/inner/planted.py", '"""Keep what it ends at."""\n'),
    "documents": ("docs/planted.md", "Every room has a door.\n"),
    "documents, an example": ("examples/policy/README.md", "A stranger may use it.\n"),
    "tests": ("tests/host/test_planted.py", '"""The whole house: all of the house."""\n'),
    "tests, a name": ("tests/test_planted.py", "def test_a_stranger_is_refused() -> None: ...\n"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_word_is_found(kind: str, tmp_path: Path) -> None:
    file, text = PLANTED[kind]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    (fault,) = excess(tmp_path, kind.partition(",")[0])
    assert f"{file}:1: " in fault


def test_code_and_data_are_not_prose(tmp_path: Path) -> None:
    (tmp_path / "diffcache").mkdir()
    (tmp_path / "diffcache" / "good.py").write_text('beside = 1\nx = f"{beside} roommates"\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text('def test_good() -> None:\n    said = "told beside"\n')
    assert not excess(tmp_path, "package")
    assert not excess(tmp_path, "tests")


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    counts = {part: Counter({word: len(places) for word, places in found(where, part).items()}) for part in PROSE}
    print(f"{'words':38}" + "".join(f"{part:>12}" for part in PROSE))
    for word in WORDS:
        print(f"{word:38}" + "".join(f"{counts[part][word]:12}" for part in PROSE))
    print(f"{'all':38}" + "".join(f"{counts[part].total():12}" for part in PROSE))
