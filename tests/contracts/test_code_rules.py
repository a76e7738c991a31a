"""Rules of the code that a reader may rely on, each with planted faults that it must catch."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffcache"
SETTINGS = "settings"  # the one package that may read the environment
SPEAKING = {"cli", "demo", "__main__"}  # packages that may write on the screen
PROMISING = {"api", "documents", "executor", "host"}  # what they refuse, they refuse by name
LONGEST = 600

Rule = Callable[[str, ast.Module, str], Iterator[int]]  # package, syntax, text -> lines at fault


def only_the_command_speaks(package: str, tree: ast.Module, _text: str) -> Iterator[int]:
    if package not in SPEAKING:
        yield from (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print")


def no_error_is_swallowed(_room: str, tree: ast.Module, _text: str) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None or (_broad(node.type) and all(map(_idle, node.body))):
                yield node.lineno
        elif isinstance(node, ast.Call) and _name(node.func) == "suppress" and any(map(_broad, node.args)):
            yield node.lineno


def no_class_is_called_differently(_room: str, tree: ast.Module, _text: str) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "__call__" and not isinstance(node.ctx, ast.Load):
            yield node.lineno
        elif isinstance(node, ast.Call) and _name(node.func) in {"setattr", "delattr"}:
            if any(isinstance(a, ast.Constant) and a.value == "__call__" for a in node.args):
                yield node.lineno


def the_environment_is_read_in_one_place(package: str, tree: ast.Module, _text: str) -> Iterator[int]:
    words = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    if package == SETTINGS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in words and _name(node.value) == "os":
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and words & {a.name for a in node.names}:
            yield node.lineno


def promises_are_kept_without_assert(package: str, tree: ast.Module, _text: str) -> Iterator[int]:
    if package in PROMISING:
        yield from (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert))


def nothing_read_can_run(_room: str, tree: ast.Module, _text: str) -> Iterator[int]:
    modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    plain = [
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and any(map(_weights_only, node.keywords))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and modules & {alias.name.partition(".")[0] for alias in node.names}:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in modules:
            yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == "load" and _name(node.value) == "torch":
            if node not in plain:
                yield node.lineno


def _weights_only(keyword: ast.keyword) -> bool:
    return keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def masked_loads_are_filled_with_zeros(package: str, tree: ast.Module, _text: str) -> Iterator[int]:
    """Without ``other`` masked lanes are undefined on a GPU; constants that are not zero have been compiled wrongly."""
    if package != "kernels":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            given = dict(zip(("mask", "other"), node.args[1:])) | {k.arg: k.value for k in node.keywords}  # noqa: B905 — the rest are keywords
            other = given.get("other")
            if "mask" in given and not (isinstance(other, ast.Constant) and other.value == 0):
                yield node.lineno


def no_file_is_too_long(_room: str, _tree: ast.Module, text: str) -> Iterator[int]:
    if text.count("\n") > LONGEST:
        yield LONGEST + 1


def nothing_is_left_for_later(_room: str, _tree: ast.Module, text: str) -> Iterator[int]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield number


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _broad(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple):
        return any(map(_broad, node.elts))
    return _name(node) in {"Exception", "BaseException"}


def _idle(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass | ast.Continue) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


# rule -> (file, code) it must catch, (file, code) it must let pass
CASES: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    only_the_command_speaks: (
        [("executor.py", "print('skipped')"), ("eval/fid.py", "def f(log=print): ...")],
        [("cli.py", "print('done')"), ("demo/run.py", "print('done')"), ("api.py", "fingerprint = 'print(1)'")],
    ),
    no_error_is_swallowed: (
        [
            ("patch.py", "try:\n    f()\nexcept:\n    raise"),
            ("patch.py", "try:\n    f()\nexcept Exception:\n    pass"),
            ("patch.py", "try:\n    f()\nexcept (OSError, BaseException) as e:\n    ..."),
            ("patch.py", "for x in y:\n    try:\n        f()\n    except Exception:\n        continue"),
            ("patch.py", "import contextlib\nwith contextlib.suppress(Exception):\n    f()"),
        ],
        [
            ("patch.py", "try:\n    f()\nexcept KeyError:\n    pass"),
            ("patch.py", "try:\n    f()\nexcept Exception:\n    undo()\n    raise"),
            ("patch.py", "from contextlib import suppress\nwith suppress(KeyError):\n    f()"),
        ],
    ),
    no_class_is_called_differently: (
        [
            ("host.py", "pipe.__class__.__call__ = ours"),
            ("host.py", "Pipeline.__call__, x = ours, 1"),
            ("host.py", "setattr(type(pipe), '__call__', ours)"),
            ("host.py", "del pipe.__call__"),
        ],
        [("host.py", "inner = type(pipe).__call__"), ("patch.py", "class A:\n    def __call__(self): ...")],
    ),
    the_environment_is_read_in_one_place: (
        [
            ("api.py", "import os\nx = os.environ['X']"),
            ("api.py", "import os\nx = os.getenv('X')"),
            ("profiling/run.py", "from os import environ"),
        ],
        [("settings.py", "import os\nx = os.environ.get('X')"), ("api.py", "import os\nos.replace(a, b)")],
    ),
    promises_are_kept_without_assert: (
        [(f"{package}.py", "def f(x):\n    assert x") for package in sorted(PROMISING)],
        [("kernels/hold.py", "def f(x):\n    assert x")],
    ),
    nothing_read_can_run: (
        [
            ("documents/document.py", "import pickle"),
            ("profile.py", "from joblib import load"),
            ("profile.py", "x = eval(text)"),
            ("assets/__init__.py", "import torch\nx = torch.load(path)"),
            ("assets/__init__.py", "import torch\nx = torch.load(path, weights_only=False)"),
            ("assets/__init__.py", "import torch\nx = torch.load(path, weights_only=safe)"),
            ("assets/__init__.py", "import torch\nread = torch.load\nx = f(weights_only=True)"),
        ],
        [
            ("assets/__init__.py", "model.eval()\nx = load_file(path)"),
            ("assets/__init__.py", "import torch\nx = torch.load(path, weights_only=True)"),
            ("cli.py", "import torch\ntorch.utils.load(x)"),
        ],
    ),
    masked_loads_are_filled_with_zeros: (
        [
            ("kernels/tiles.py", "x = tl.load(p, mask=inside)"),
            ("kernels/tiles.py", "x = tl.load(p, inside)"),
            ("kernels/predict/kernel.py", "x = tl.load(p, mask=inside, other=0x88)"),
            ("kernels/predict/kernel.py", "x = tl.load(p, mask=inside, other=nothing)"),
            ("kernels/predict/kernel.py", "x = tl.load(p, inside, 1.0)"),
        ],
        [
            ("kernels/tiles.py", "x = tl.load(p)"),
            ("kernels/tiles.py", "x = tl.load(p, mask=inside, other=0.0)"),
            ("kernels/tiles.py", "x = tl.load(p, inside, 0)"),
            ("kernels/tiles.py", "x = load(p, rows, stride, columns, inside)"),
            ("assets/__init__.py", "x = np.load(p, mask=inside)"),
        ],
    ),
    no_file_is_too_long: ([("api.py", "x = 1\n" * (LONGEST + 1))], [("api.py", "x = 1\n" * LONGEST)]),
    nothing_is_left_for_later: (
        [("api.py", f"x = 1  # {word}: rest") for word in ("TO" + "DO", "FIX" + "ME", "HA" + "CK")],
        [("api.py", "todos = hackney = 1")],
    ),
}

RULES = pytest.mark.parametrize("rule", CASES, ids=lambda rule: rule.__name__)


def lines_at_fault(rule: Rule, file: str, text: str) -> list[int]:
    return list(rule(Path(file).parts[0].removesuffix(".py"), ast.parse(text), text))


@RULES
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}:{n}" for n in lines_at_fault(rule, str(path.relative_to(PACKAGE)), text)]
    assert not found, f"{rule.__name__}: {', '.join(found)}"


@RULES
def test_a_planted_fault_is_caught(rule: Rule) -> None:
    for file, code in CASES[rule][0]:
        assert lines_at_fault(rule, file, code), (file, code[:80])


@RULES
def test_the_innocent_pass(rule: Rule) -> None:
    for file, code in CASES[rule][1]:
        assert not lines_at_fault(rule, file, code), (file, code[:80])


# Settings of the tools.


def ignores_without_reason(toml: str) -> list[str]:
    """Lines of pyproject.toml that silence a tool and do not say why at their end."""
    silent, inside = [], False
    for line in toml.splitlines():
        inside = inside or line.startswith("[tool.ruff.lint.per-file-ignores]") or line.startswith("ignore = [")
        if inside and (line == "]" or (line.startswith("[") and "ignores" not in line)):
            inside = False
        is_item = inside and re.match(r'\s*"', line)
        if (is_item or line.startswith("ignore_")) and not re.search(r"[\]\",e]\s+# \w", line):
            silent.append(line.strip())
    return silent


def test_every_ignore_has_its_reason_on_the_same_line() -> None:
    assert ignores_without_reason((ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_an_ignore_without_reason_is_caught() -> None:
    toml = '[tool.ruff.lint]\nselect = ["E"]\nignore = [\n    "E501",\n    "E741",  # math\n]\n'
    toml += '[tool.ruff.lint.per-file-ignores]\n"a.py" = ["E"]\n"b.py" = ["E"]  # generated\n\n[tool.mypy]\n'
    toml += "ignore_missing_imports = true\nignore_errors = true  # foreign\n"
    assert ignores_without_reason(toml) == ['"E501",', '"a.py" = ["E"]', "ignore_missing_imports = true"]


def pins(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r'"([\w-]+)==([\w.]+)"', text):
        found.setdefault(name, set()).add(version)
    return found


def test_pre_commit_and_the_dev_extra_name_the_same_versions() -> None:
    dev = pins((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = pins((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert dev.keys() >= {"ruff", "mypy"}
    assert "ruff" in hooks
    assert {name: hooks[name] for name in dev.keys() & hooks.keys()} == {
        name: dev[name] for name in dev.keys() & hooks.keys()
    }


def test_two_versions_of_one_tool_are_distinguished() -> None:
    assert pins('["ruff==0.1.0"]') != pins('["ruff==0.1.1"]')
    assert pins('["ruff==0.1.0", "ruff==0.1.1"]') == {"ruff": {"0.1.0", "0.1.1"}}


NAMES = {"open_clip": "open-clip-torch", "skimage": "scikit-image"}  # module -> package, where the names differ


def never_installed(tests: str, toml: str) -> set[str]:
    """Return the packages without which tests are skipped, and which no extra or dependency installs."""
    modules = set(re.findall(r'importorskip\("(\w+)', tests)) - {"diffcache"}
    return {NAMES.get(module, module.replace("_", "-")) for module in modules} - set(
        re.findall(r'"([\w-]+)[=>]=', toml)
    )


def test_no_test_is_skipped_in_ci_because_a_package_is_not_installed() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
    assert never_installed(tests.replace(PLANTED, ""), (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == set()
    extras = re.search(r'^EXTRAS="(.*)"$', (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert extras is not None
    assert {"dev-all", "kernels"} <= set(extras[1].split(","))


PLANTED = 'pytest.importorskip("cache_dot")'


def test_a_package_that_no_extra_installs_is_found() -> None:
    toml = 'dev = ["cache-dit>=1.5", "scikit-image>=0.22"]'
    assert never_installed(PLANTED, toml) == {"cache-dot"}
    assert never_installed('importorskip("cache_dit.x")\nimportorskip("skimage")', toml) == set()
