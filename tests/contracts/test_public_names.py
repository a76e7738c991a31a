"""The public names: what ``dir`` lists, and an example for each."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

import diffcache

pytestmark = pytest.mark.fast


def example_of(docstring: str) -> str:
    """Return the code of the section Example, without prompts and results; "" if there is none."""
    section = re.search(r"^Example:\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    lines = section[1].splitlines() if section else []
    return "\n".join(line.strip()[4:] for line in lines if line.strip().startswith((">>>", "...")))


def test_dir_lists_the_public_names_and_no_submodule() -> None:
    listed = dir(diffcache)
    assert [name for name in listed if not name.startswith("__")] == sorted(diffcache.__all__)
    assert {"__all__", "__version__", "__doc__", "__name__"} < set(listed)
    assert len(listed) == len(set(listed))
    assert not [name for name in listed if not hasattr(diffcache, name)]


@pytest.mark.parametrize("name", ["host", "documents", "planning", "executor", "eval", "api", "errors", "cli"])
def test_submodules_can_be_imported_all_the_same(name: str) -> None:
    exec(f"from diffcache import {name}")
    assert importlib.import_module(f"diffcache.{name}") is getattr(diffcache, name)


@pytest.mark.parametrize("name", diffcache.__all__)
def test_every_public_name_has_an_example_that_python_can_read(name: str) -> None:
    code = example_of(getattr(diffcache, name).__doc__ or "")
    assert code, f"the docstring of {name} has no section Example"
    ast.parse(code)
    assert "diffcache." in code


def test_a_docstring_without_an_example_is_found() -> None:
    assert example_of("Do it.\n\n    Args:\n        x: A number.\n    ") == ""
    assert example_of("Do it.\n\n    Example:\n        >>> f(\n        ...     1)\n        3\n    ") == "f(\n    1)"
