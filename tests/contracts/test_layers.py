"""Imports inside the package run one way, and what must stay light knows neither torch nor diffusers.

Read from the syntax, so imports inside functions and under ``if TYPE_CHECKING`` count like all others. Every test that
expects silence has a twin below that plants the fault in a copy of the package and expects to hear of it.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from layers import HEAVY, INNER, LIGHT, MUTUAL, NEVER, ONLY, PLUG_INS, RANK

TABLE = "tests/helpers/layers.py"
PACKAGE = Path(__file__).parents[2] / "diffcache"

CALLS = {"load", "entry", "names", "import_module"}  # calls whose first argument, when spelled out, is an import


def package_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@functools.cache  # each copy of the package is the same but for a line
def parse(text: str) -> list[ast.AST]:
    """The imports and calls of a file."""
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call)]


def sources(root: Path) -> Iterator[tuple[Path, list[ast.AST]]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root), parse(path.read_text(encoding="utf-8"))


def imported(nodes: list[ast.AST], packages: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what it imports): "diffcache.<package>", "diffcache.__init__", or the top name of a foreign package."""

    def target(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "diffcache":
            return parts[0]
        return f"diffcache.{parts[1]}" if len(parts) > 1 else "diffcache.__init__"

    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, target(alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
        elif isinstance(node, ast.ImportFrom) and node.module == "diffcache":
            for alias in node.names:
                yield node.lineno, f"diffcache.{alias.name}" if alias.name in packages else "diffcache.__init__"
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, target(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in CALLS and isinstance(name, str) and name.startswith("diffcache."):
                yield node.lineno, target(name)


def violations(root: Path) -> set[str]:
    """Every import that breaks the table, in words that do not change with line numbers elsewhere."""
    found: set[str] = set()
    inside: dict[str, set[str]] = {}
    outside: dict[str, set[str]] = {}
    files = list(sources(root))
    packages = {package_of(path) for path, _ in files} | RANK.keys()
    for path, nodes in files:
        here = package_of(path)
        if here not in RANK:
            found.add(f"{path}: package {here!r} has no layer. Add it to LAYERS in {TABLE}, or move the file")
            continue
        for line, target in imported(nodes, packages):
            where = f"{path}:{line} ({here}, layer {RANK[here]})"
            if target == ".":
                found.add(f"{where} has a relative import. Write 'from diffcache.…'")
                continue
            if not target.startswith("diffcache."):
                outside.setdefault(here, set()).add(target)
                continue
            there = target.removeprefix("diffcache.")
            if there == here:
                continue
            inside.setdefault(here, set()).add(there)
            if there not in RANK:
                found.add(f"{where} imports {there!r}, which has no layer")
            elif RANK[there] > RANK[here] or (RANK[there] == RANK[here] and RANK[here] not in MUTUAL):
                found.add(
                    f"{where} imports {there} (layer {RANK[there]}). Only layers above {RANK[here]} may be imported"
                )
            elif there in NEVER.get(here, ()) or there not in ONLY.get(here, RANK):
                found.add(f"{where} imports {there}, which this package may not import. See ONLY and NEVER in {TABLE}")
        found |= {*plug_in_violations(path, nodes), *inner_violations(path, nodes)}
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        found.add(f"packages need each other: {' -> '.join(error.args[1])}")
    for light in LIGHT:
        for package, chain in reachable(light, inside).items():
            for heavy in sorted(HEAVY & outside.get(package, set())):
                found.add(f"{light} must stay without {heavy}, and reaches it: {' -> '.join((*chain, heavy))}")
    return found


def modules_imported(nodes: list[ast.AST], package: str) -> Iterator[tuple[int, str]]:
    """(line, the full name of each module, or of each name in a module, that is imported from ``package``)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("diffcache", package)  # what is imported is a module of these
            names = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
            yield from ((node.lineno, name) for name in names)


def plug_in_violations(path: Path, nodes: list[ast.AST]) -> Iterator[str]:
    """Imports of a file in one of PLUG_INS that the table does not allow."""
    folder = path.parent.as_posix()
    if folder not in PLUG_INS:
        return
    own = f"diffcache.{folder.replace('/', '.')}"
    allowed = (own, *(f"diffcache.{name}" for name in PLUG_INS[folder]))
    for line, module in modules_imported(nodes, own.rpartition(".")[0]):
        if module.partition(".")[0] == "diffcache" and not f"{module}.".startswith(tuple(f"{a}." for a in allowed)):
            yield f"{path}:{line} imports {module}, which {folder} may not import. See PLUG_INS in {TABLE}"


def inner_violations(path: Path, nodes: list[ast.AST]) -> Iterator[str]:
    """Imports between the folders of one package that do not follow the order in INNER."""
    package, *inner = path.with_suffix("").parts
    if package not in INNER or len(inner) < 2:
        return
    folders = INNER[package]
    if inner[0] not in folders:
        yield f"{path}: folder {inner[0]!r} has no place. Add it to INNER in {TABLE}, or move the file"
        return
    for line, module in modules_imported(nodes, f"diffcache.{package}"):
        parts = module.split(".")
        if parts[:2] != ["diffcache", package] or parts[2:3] == [inner[0]]:
            continue
        if len(parts) < 3 or parts[2] not in folders or folders.index(parts[2]) > folders.index(inner[0]):
            yield f"{path}:{line} imports {module}. {inner[0]} comes before it in INNER in {TABLE}"


def reachable(start: str, inside: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """Package -> a shortest chain of imports that leads to it from ``start``."""
    chains = {start: (start,)}
    todo = [start]
    while todo:
        here = todo.pop(0)
        for there in sorted(inside.get(here, set()) - chains.keys()):
            chains[there] = (*chains[here], there)
            todo.append(there)
    return chains


def test_imports_run_one_way() -> None:
    assert not violations(PACKAGE), "\n" + "\n".join(sorted(violations(PACKAGE)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files, to be spoiled."""
    for path in PACKAGE.rglob("*.py"):
        target = tmp_path / "diffcache" / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path / "diffcache"


def heard(root: Path, **files: str) -> str:
    """What is new among the violations after ``files`` got these lines at their end."""
    before = violations(root)
    for name, code in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{code}\n")
    return "\n".join(sorted(violations(root) - before))


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("errors", "import diffcache.documents.schedule", "imports documents (layer 1)"),
        ("documents", "from diffcache.api import accelerate", "imports api (layer 4)"),
        ("executor", "from diffcache import api", "imports api (layer 4)"),
        ("executor", "import diffcache", "imports __init__ (layer 9)"),
        ("executor", "from diffcache import accelerate", "imports __init__ (layer 9)"),
        (
            "schedulers__planted",
            "def plan():\n    from diffcache.executor import Executor",
            "imports executor (layer 3)",
        ),
        ("schedulers__planted", "from diffcache.host.levels import moved", "imports host (layer 2)"),
        ("host", "from diffcache.schedulers import names", "imports schedulers (layer 2)"),
        ("executor__planted", "import diffcache.profiling", "imports profiling (layer 5)"),
        ("documents__budget", "from diffcache.schedulers import Planned", "imports schedulers (layer 2)"),
        ("schedulers__planted", "from diffcache.planning import plan", "imports planning (layer 3)"),
        ("planning", "from diffcache.profiling.fitting import fit", "imports profiling (layer 5)"),
        ("assets__planted", "from diffcache.eval import fid", "imports eval (layer 6)"),
        ("executor__cost", "from diffcache.demo import run_demo", "imports demo (layer 7)"),
        ("executor", "from diffcache.registry import load\nload('diffcache.eval', 'fid')", "imports eval (layer 6)"),
        ("assets__planted", "from diffcache.documents.schedule import CacheSchedule", "this package may not import"),
        ("kernels__planted__op", "from diffcache.documents.sites import Site", "this package may not import"),
        ("executor__criteria__planted", "from diffcache.executor.state import State", "may not import. See PLUG_INS"),
        ("executor__criteria__planted", "from diffcache.executor import decider", "may not import. See PLUG_INS"),
        ("executor__criteria__planted", "import diffcache.executor", "may not import. See PLUG_INS"),
        ("executor__criteria__planted", "def f():\n    from diffcache import host", "may not import. See PLUG_INS"),
        ("profiling__replay__planted", "from diffcache.profiling.fitting.fit import fit", "replay comes before it"),
        ("profiling__recording__planted", "from diffcache.profiling import replay", "recording comes before it"),
        ("profiling__fitting__planted", "from diffcache.profiling import measure", "fitting comes before it"),
        ("profiling__drawer__planted", "", "folder 'drawer' has no place"),
        ("executor", "from .schedule import CacheSchedule", "relative import"),
        ("pastimes", "", "package 'pastimes' has no layer. Add it to LAYERS"),
        ("pastimes__chess", "import numpy", "package 'pastimes' has no layer. Add it to LAYERS"),
        ("api", "from diffcache.pastimes import chess", "imports 'pastimes', which has no layer"),
    ],
)
def test_a_planted_import_is_reported(copy: Path, file: str, code: str, words: str) -> None:
    assert words in heard(copy, **{file: code})


@pytest.mark.parametrize(
    "code",
    [
        "import torch",
        "from torch.nn import Module",
        "import diffusers.hooks",
        "def plan():\n    import torch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor",
    ],
)
@pytest.mark.parametrize(
    "file", ["schedulers__planted", "documents__schedule", "simulation__runs", "planning__planner"]
)
def test_torch_or_diffusers_planted_into_a_light_package_is_reported(copy: Path, file: str, code: str) -> None:
    assert "must stay without" in heard(copy, **{file: code})


def test_torch_behind_another_package_is_reported(copy: Path) -> None:
    words = heard(copy, schedulers__planted="import diffcache.text", text="import torch")
    assert "schedulers must stay without torch, and reaches it: schedulers -> text -> torch" in words


def test_two_packages_that_import_each_other_are_reported(copy: Path) -> None:
    words = heard(copy, documents__planted="import diffcache.simulation")
    assert "packages need each other" in words


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "schedulers__planted",
            "import numpy\nfrom diffcache.documents.schedule import CacheSchedule\nfrom diffcache import errors",
        ),
        ("kernels__planted", "import torch\nfrom diffcache.errors import BadOption"),
        ("profiling__fitting__planted", "from diffcache.profiling.replay.replay import Replay"),
        ("profiling__planted", "from diffcache.profiling.calibration.search import Search"),
        ("executor", "from diffcache.registry import load\nload('diffcache.executor.criteria', 'drift')"),
        ("executor", "import logging\nlogging.getLogger('diffcache.cli')"),
        ("eval__planted", "from diffcache import api\nimport scipy"),
        ("cli", "from diffcache.demo import run"),
        (
            "executor__criteria__planted",
            "from diffcache.executor.criteria import About\nfrom diffcache.executor.store import Store\nimport torch",
        ),
        ("executor", "from diffcache.executor.criteria import About"),
    ],
)
def test_an_import_that_the_table_allows_is_not_reported(copy: Path, file: str, code: str) -> None:
    assert heard(copy, **{file: code}) == ""


def test_the_picture_of_the_layers_is_drawn_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: python docs/draw_layers.py."""
    monkeypatch.syspath_prepend(str(PACKAGE.parent / "docs"))
    import draw_layers

    assert draw_layers.OUT.read_text(encoding="utf-8") == draw_layers.drawn()
