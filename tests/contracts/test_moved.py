"""Modules that have moved: an import of the old name says where they are."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from diffcache.moved import MOVED

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_name_raises_an_error_that_states_the_new_one(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"diffcache.{name} is now diffcache.{MOVED[name]}"):
        importlib.import_module(f"diffcache.{name}")
    importlib.import_module(f"diffcache.{MOVED[name]}")


def test_from_imports_raise_it_too() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"diffcache\.schedule is now diffcache\.documents\.schedule"):
        exec("from diffcache.schedule import CacheSchedule")
    with pytest.raises(ModuleNotFoundError, match=r"diffcache\.store is now"):
        exec("from diffcache import store")


def test_other_names_are_not_found_as_usual() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'diffcache\.nothing'"):
        importlib.import_module("diffcache.nothing")


@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_look_for_an_old_name_raises_nothing_and_imports_nothing(name: str) -> None:
    found = importlib.util.find_spec(f"diffcache.{name}")
    assert found is not None
    assert found.name == f"diffcache.{name}"
    assert found.origin is None
    assert found.name not in sys.modules


def test_a_look_for_other_names_finds_what_there_is() -> None:
    assert importlib.util.find_spec("diffcache.nothing") is None
    found = importlib.util.find_spec("diffcache.documents.schedule")
    assert found is not None
    assert found.origin is not None
