"""Tests import what a package offers from the package, not from the module inside that defines it.

So if a module is split, moved or renamed, only tests of its package change. Tests of a package may import its modules
for what the package does not offer. Other tests may import the modules in ``INNER``, for the reason given there.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffcache"

# Each file of these folders is public: its name is the one that users type, and users import it.
REGISTRIES = (
    "diffcache.schedulers",
    "diffcache.executor.criteria",
    "diffcache.eval.metrics",
    "diffcache.eval.extractors",
    "diffcache.host.kinds",
    "diffcache.tokens.rules",
)
# Modules that users import: an error message names the first, and the ``example.py`` of a kernel imports the second.
PUBLIC = ("diffcache.profiling.router_file", "diffcache.kernels.examples")
# Folder of tests -> the packages that it tests besides the one of its name.
ALSO = {"demo": ("assets",), "schedulers": ("planning", "presets", "simulation")}


def faces() -> set[str]:
    """Return the packages, and the modules that lie in no package but ``diffcache``."""
    packages = {
        ".".join(("diffcache", *path.parent.relative_to(PACKAGE).parts)) for path in PACKAGE.rglob("__init__.py")
    }
    return packages | {f"diffcache.{path.stem}" for path in PACKAGE.glob("*.py")}


FACES = faces()


@functools.cache
def offered(package: str) -> dict[str, str]:
    """Return names in ``__all__`` of a package and of the packages inside it -> the package that offers them.

    What none of them offers, ``diffcache`` may offer.
    """
    inside = sorted((face for face in FACES if f"{face}.".startswith(f"{package}.")), key=len, reverse=True)
    inside.insert(0, "diffcache")
    return {name: face for face in inside for name in getattr(importlib.import_module(face), "__all__", ())}


def imported(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the module and the name ("" for the module itself) of each import from inside of a package."""
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "diffcache":
            for alias in node.names:
                is_module = is_inner(f"{node.module}.{alias.name}")
                found.append((f"{node.module}.{alias.name}", "") if is_module else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names if alias.name.startswith("diffcache.")]
        yield from ((node.lineno, module, name) for module, name in found if is_inner(module))


def is_inner(module: str) -> bool:
    """Return whether a module lies inside of a package, is not a file of a registry, and is not public."""
    package, _, name = module.rpartition(".")
    if module in FACES or module in PUBLIC or (package in REGISTRIES and not name.startswith("_")):
        return False
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").exists()


def problems(folder: str, source: str) -> list[str]:
    """Return what is wrong with the imports of a test file in a folder of ``tests/``."""
    found = []
    for line, module, name in imported(source):
        package = module.split(".")[1]
        face = offered(f"diffcache.{package}").get(name)
        if face is not None and is_same(face, module, name):
            found.append(f"line {line}: import {name} from {face}, not from {module}")
        elif package not in (folder, *ALSO.get(folder, ())) and module not in INNER:
            found.append(
                f"line {line}: {module} lies inside of the package {package}, which tests of {folder} do not test"
            )
    return found


def is_same(face: str, module: str, name: str) -> bool:
    """Return whether a package and a module mean the same by a name."""
    return getattr(importlib.import_module(face), name) is getattr(importlib.import_module(module), name, None)


# Reason -> the modules that tests of other packages may import.
REASONS = {
    "the table that a command prints of a plan": "cli.show",
    "files of every kind, and what they may hold": (
        "documents.checks documents.container documents.files eval.evaluation eval.plausible eval.record "
        "eval.reference eval.saved_parts profiling.measuring.partial_profile profiling.measuring.plausible"
    ),
    "where tests plant faults, or watch that nothing runs": (
        "demo.run eval.alignment eval.runner executor.site executor.stacks executor.wrappers"
    ),
    "what a run keeps and states": ("executor.cost executor.program executor.state executor.store planning.storage"),
    "mathematics that tests compute with": "eval.distribution eval.frechet",
}
INNER = {f"diffcache.{module}" for modules in REASONS.values() for module in modules.split()}
FILES = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_a_test_imports_what_packages_offer(path: Path) -> None:
    assert problems(path.relative_to(ROOT / "tests").parts[0], path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("folder", "source", "problem"),
    [
        ("executor", "from diffcache.executor.engine import Executor", "import Executor from diffcache.executor, not"),
        (
            "eval",
            "def f():\n    from diffcache.eval.methods import Method",
            "line 2: import Method from",
        ),
        ("eval", "from diffcache.api import accelerate", ""),
        ("host", "from diffcache.planning.resampling import resampled", "import resampled from diffcache, not"),
        (
            "host",
            "from diffcache.executor.bound import Bound",
            "executor.bound lies inside of",
        ),
        (
            "host",
            "from diffcache.executor import bound",
            "executor.bound lies inside of",
        ),
        ("host", "import diffcache.executor.bound", "executor.bound lies inside of"),
        ("schedulers", "from diffcache.planning.plots import draw", ""),
        ("executor", "from diffcache.executor.bound import Bound", ""),
        ("executor", "from diffcache.executor import Executor", ""),
        ("host", "from diffcache.schedulers.uniform import evenly", ""),
        ("host", "from diffcache.schedulers._cuts import following", "_cuts lies inside of"),
        ("host", "from diffcache.errors import BadOption", ""),
        ("schedulers", "from diffcache.profiling import router_file", ""),
    ],
)
def test_an_import_from_inside_of_a_package_is_noticed(folder: str, source: str, problem: str) -> None:
    found = problems(folder, source)
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_every_exception_is_there_and_in_use() -> None:
    used = set()
    for path in FILES:
        folder = path.relative_to(ROOT / "tests").parts[0]
        for _, module, _ in imported(path.read_text(encoding="utf-8")):
            if module.split(".")[1] not in (folder, *ALSO.get(folder, ())):
                used.add(module)
    assert INNER - used == set()
