"""The names of a registry are its files; loading a name imports only its file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from diffcache.errors import UnknownName
from diffcache.registry import load, names

pytestmark = pytest.mark.fast

ROOM = "house_of_tests.schedulers"


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``house_of_tests`` with a registry of three names, and a package of another author."""
    room = tmp_path / "house_of_tests" / "schedulers"
    room.mkdir(parents=True)
    (room.parent / "__init__.py").touch()
    (room / "__init__.py").touch()
    (room / "uniform.py").write_text("def plan():\n    return 'uniform'\n")
    (room / "ertacache.py").write_text("raise RuntimeError('must not be imported')\n")
    (room / "_shared.py").write_text("raise RuntimeError('must not be imported')\n")
    (room / "notes.txt").touch()
    (room / "folder").mkdir()
    (room / "folder" / "__init__.py").write_text("def plan():\n    return 'folder'\n")
    (tmp_path / "stranger_of_tests.py").write_text(
        "class Mine:\n"
        "    def plan():\n        return 'mine'\n\n"
        "    class Inner:\n        def plan():\n            return 'inner'\n"
    )
    (tmp_path / "poor_stranger_of_tests.py").write_text("import not_installed_of_tests\n")
    (tmp_path / "buggy_stranger_of_tests.py").write_text("''.no_such_method\n")
    (tmp_path / "wrong_stranger_of_tests.py").write_text("int('x')\n")
    foreign = tmp_path / "foreign_of_tests"
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    (foreign / "doubling.py").write_text("def plan():\n    return 'doubling'\n")
    (foreign / "poor.py").write_text("import not_installed_of_tests\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield room
    for name in [name for name in sys.modules if "_of_tests" in name]:
        del sys.modules[name]


def test_the_files_and_folders_are_the_names() -> None:
    assert names(ROOM) == ("ertacache", "folder", "uniform")


def test_a_new_file_is_a_new_name(room: Path) -> None:
    assert "mine" not in names(ROOM)
    (room / "mine.py").write_text("def plan():\n    return 'mine'\n")
    assert "mine" in names(ROOM)
    assert load(ROOM, "mine").plan() == "mine"


def test_asking_for_one_name_imports_that_file_only() -> None:
    module = load(ROOM, "uniform")
    assert isinstance(module, ModuleType)
    assert module.plan() == "uniform"
    assert [name for name in sys.modules if name.startswith(f"{ROOM}.")] == [f"{ROOM}.uniform"]


def test_a_folder_is_loaded_like_a_file() -> None:
    assert load(ROOM, "folder").plan() == "folder"


def test_an_unknown_name_is_reported_with_what_is_known_and_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        load(ROOM, "ertcache")
    assert str(caught.value) == (
        "no scheduler called 'ertcache'. Known: ertacache, folder, uniform. Did you mean 'ertacache'? "
        "Your own is reached as 'package.module:attribute'."
    )


@pytest.mark.parametrize("name", ["_shared", "", "uniform.plan", "../schedulers/uniform", "notes", "__init__"])
def test_only_names_are_names(name: str) -> None:
    with pytest.raises(UnknownName):
        load(ROOM, name)


def test_a_module_of_another_package_is_reached_by_its_address() -> None:
    assert load(ROOM, "stranger_of_tests:Mine").plan() == "mine"
    assert load(ROOM, "stranger_of_tests:Mine.Inner").plan() == "inner"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("not_there_of_tests:plan", "There is no module 'not_there_of_tests'"),
        ("stranger_of_tests.deeper:plan", "There is no module 'stranger_of_tests.deeper'"),
        ("stranger_of_tests:plam", "Module 'stranger_of_tests' has no 'plam'"),
        ("stranger_of_tests:", "not of the form"),
        (":plan", "not of the form"),
        (".uniform:plan", "not of the form"),
        ("stranger_of_tests:Mine:plan", "not of the form"),
    ],
)
def test_a_missing_module_of_another_package_is_an_unknown_name(address: str, words: str) -> None:
    with pytest.raises(UnknownName, match=words):
        load(ROOM, address)


def test_a_file_of_another_package_is_imported_by_its_address() -> None:
    assert load(ROOM, "foreign_of_tests:doubling").plan() == "doubling"
    with pytest.raises(UnknownName, match="Module 'foreign_of_tests' has no 'dubling'"):
        load(ROOM, "foreign_of_tests:dubling")


def test_errors_inside_another_package_are_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="not_installed_of_tests"):
        load(ROOM, "foreign_of_tests:poor")
    with pytest.raises(ModuleNotFoundError, match="not_installed_of_tests"):
        load(ROOM, "poor_stranger_of_tests:plan")
    with pytest.raises(AttributeError, match="no_such_method"):
        load(ROOM, "buggy_stranger_of_tests:plan")
    with pytest.raises(ValueError, match="invalid literal"):
        load(ROOM, "wrong_stranger_of_tests:plan")
