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

PACKAGE = Path(__file__).parents[1] / "diffcache"

# A room is a file or a folder of the package. It may import the rooms of the lines above its own.
LAYERS = (
    ("errors", "_text"),
    (
        *("schedule", "profile", "budget", "sites", "patch"),
        *("_registry", "_document", "_container", "_files", "_outputs", "_checks", "_hub", "_settings"),
        *("_digest", "_tensor_hash"),
    ),
    ("schedulers", "kernels", "predictors"),
    ("store", "adapters", "host", "levels", "channels", "planning", "resampling"),
    ("executor", "profiling", "routers_file"),
    ("reports", "estimates", "plots", "correction", "optimizing", "api", "_requests"),
    ("eval", "assets"),
    ("demo", "cli"),
    ("__init__", "__main__"),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

# The rooms of these lines may import each other as well, as long as no two need each other.
SOCIABLE = {RANK["errors"], RANK["schedule"], RANK["api"], RANK["cli"], RANK["__init__"]}

ONLY = {"assets": {"errors"}}  # room -> all it may import, whatever its rank allows
NEVER = {"kernels": {"sites"}}  # kernels see tensors, never places
# Folder of a room -> the rooms that its files may import. Of their own room they import the folder alone.
PARTS = {"executor/criteria": {"errors", "schedule", "_registry", "kernels", "store"}}
LIGHT = ("errors", "schedule", "profile", "budget", "_document", "_registry", "schedulers", "planning", "plots")
HEAVY = {"torch", "diffusers"}  # unreachable from LIGHT, documents and arithmetic, through other rooms too

CALLS = {"load", "entry", "names", "import_module"}  # calls whose first argument, when spelled out, is an import


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


parse = functools.cache(ast.parse)  # each copy of the package is the same but for a line


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root), parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module, rooms: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what it imports): "diffcache.<room>", "diffcache.__init__", or the top name of a foreign package."""

    def target(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "diffcache":
            return parts[0]
        return f"diffcache.{parts[1]}" if len(parts) > 1 else "diffcache.__init__"

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, target(alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
        elif isinstance(node, ast.ImportFrom) and node.module == "diffcache":
            for alias in node.names:
                yield node.lineno, f"diffcache.{alias.name}" if alias.name in rooms else "diffcache.__init__"
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
    rooms = {room_of(path) for path, _ in files} | RANK.keys()
    for path, tree in files:
        here = room_of(path)
        if here not in RANK:
            found.add(
                f"{path}: room {here!r} has no layer. Write it into LAYERS in {Path(__file__).name}, or move the file"
            )
            continue
        for line, target in imported(tree, rooms):
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
            elif RANK[there] > RANK[here] or (RANK[there] == RANK[here] and RANK[here] not in SOCIABLE):
                found.add(
                    f"{where} imports {there} (layer {RANK[there]}). Only layers above {RANK[here]} may be imported"
                )
            elif there in NEVER.get(here, ()) or there not in ONLY.get(here, RANK):
                found.add(f"{where} imports {there}, which is not for this room. See ONLY and NEVER")
        found |= set(part_violations(path, tree))
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        found.add(f"rooms need each other: {' -> '.join(error.args[1])}")
    for light in LIGHT:
        for room, chain in reachable(light, inside).items():
            for heavy in sorted(HEAVY & outside.get(room, set())):
                found.add(f"{light} must stay without {heavy}, and reaches it: {' -> '.join((*chain, heavy))}")
    return found


def part_violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports of a file in one of PARTS that the table does not allow."""
    part = path.parent.as_posix()
    if part not in PARTS:
        return
    own = f"diffcache.{part.replace('/', '.')}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("diffcache", own.rpartition(".")[0])  # what is imported is a module of these
            modules = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            allowed = f"{module}.".startswith(f"{own}.") or rest.partition(".")[0] in PARTS[part]
            if package == "diffcache" and not allowed:
                yield f"{path}:{node.lineno} imports {module}, which is not for {part}. See PARTS"


def reachable(start: str, inside: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """Room -> a shortest chain of imports that leads to it from ``start``."""
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
        ("errors", "import diffcache.schedule", "imports schedule (layer 1)"),
        ("schedule", "from diffcache.api import accelerate", "imports api (layer 5)"),
        ("executor", "from diffcache import api", "imports api (layer 5)"),
        ("executor", "import diffcache", "imports __init__ (layer 8)"),
        ("executor", "from diffcache import accelerate", "imports __init__ (layer 8)"),
        (
            "schedulers__planted",
            "def plan():\n    from diffcache.executor import Executor",
            "imports executor (layer 4)",
        ),
        ("predictors__planted", "from diffcache import kernels", "imports kernels (layer 2)"),
        ("schedulers__planted", "from diffcache.predictors.hold import predict", "imports predictors (layer 2)"),
        ("host", "from diffcache.adapters import bind", "imports adapters (layer 3)"),
        ("profiling__planted", "import diffcache.executor", "imports executor (layer 4)"),
        ("budget", "from diffcache.schedulers import Planned", "imports schedulers (layer 2)"),
        ("schedulers__planted", "from diffcache.planning import plan", "imports planning (layer 3)"),
        ("planning", "from diffcache.profiling import fit", "imports profiling (layer 4)"),
        ("assets__planted", "from diffcache.eval import fid", "imports eval (layer 6)"),
        ("estimates", "from diffcache.demo import run_demo", "imports demo (layer 7)"),
        ("profiling__planted", "from diffcache.estimates import Estimate", "imports estimates (layer 5)"),
        ("executor", "from diffcache._registry import load\nload('diffcache.eval', 'fid')", "imports eval (layer 6)"),
        ("assets__planted", "from diffcache.schedule import CacheSchedule", "not for this room"),
        ("kernels__planted__op", "from diffcache.sites import Site", "not for this room"),
        ("executor__criteria__planted", "from diffcache.executor.state import State", "not for executor/criteria"),
        ("executor__criteria__planted", "from diffcache.executor import online", "not for executor/criteria"),
        ("executor__criteria__planted", "import diffcache.executor", "not for executor/criteria"),
        ("executor__criteria__planted", "def f():\n    from diffcache import host", "not for executor/criteria"),
        ("executor", "from .schedule import CacheSchedule", "relative import"),
        ("pastimes", "", "room 'pastimes' has no layer. Write it into LAYERS"),
        ("pastimes__chess", "import numpy", "room 'pastimes' has no layer. Write it into LAYERS"),
        ("api", "from diffcache.pastimes import chess", "imports 'pastimes', which has no layer"),
    ],
)
def test_a_planted_import_is_heard_of(copy: Path, file: str, code: str, words: str) -> None:
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
@pytest.mark.parametrize("file", ["schedulers__planted", "schedule", "profile", "planning"])
def test_torch_or_diffusers_planted_into_a_light_room_is_heard_of(copy: Path, file: str, code: str) -> None:
    assert "must stay without" in heard(copy, **{file: code})


def test_torch_behind_another_room_is_heard_of(copy: Path) -> None:
    words = heard(copy, schedulers__planted="import diffcache._settings", _settings="import torch")
    assert "schedulers must stay without torch, and reaches it: schedulers -> _settings -> torch" in words


def test_two_packages_that_import_each_other_are_reported(copy: Path) -> None:
    words = heard(copy, demo="import diffcache.cli", cli="def main():\n    import diffcache.demo")
    assert "rooms need each other" in words


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "schedulers__planted",
            "import numpy\nfrom diffcache.schedule import CacheSchedule\nfrom diffcache import errors",
        ),
        ("predictors__planted", "import torch\nfrom diffcache.errors import BadOption"),
        ("executor", "from diffcache._registry import load\nload('diffcache.predictors', 'hold')"),
        ("executor", "import logging\nlogging.getLogger('diffcache.cli')"),
        ("eval__planted", "from diffcache import api\nimport scipy"),
        ("cli", "from diffcache.demo import run"),
        (
            "executor__criteria__planted",
            "from diffcache.executor.criteria import About\nfrom diffcache.store import Store\nimport torch",
        ),
        ("executor", "from diffcache.executor.criteria import About"),
    ],
)
def test_an_import_that_the_table_allows_is_not_heard_of(copy: Path, file: str, code: str) -> None:
    assert heard(copy, **{file: code}) == ""
