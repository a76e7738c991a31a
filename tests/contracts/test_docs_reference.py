"""The reference pages of ``docs/`` are complete: commands, methods, public names and errors."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import typer.main

import diffcache
from diffcache import cli, errors, planning, registry, schedulers, tokens

pytestmark = pytest.mark.fast

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import reference_pages  # noqa: E402


def documented(text: str) -> set[str]:
    """Return the objects of ``diffcache`` that a page asks mkdocstrings for."""
    return set(re.findall(r"^::: diffcache\.([\w.]+)$", text, re.MULTILINE))


def test_every_command_and_option_is_on_the_page() -> None:
    page = reference_pages.command_line()
    for name, command in reference_pages.commands(typer.main.get_command(cli.app), "diffcache"):
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for option in command.params:
            if not option.hidden and option.param_type_name == "option":
                assert f"`{option.opts[0]}`" in section, (name, option.opts)


def test_every_method_is_on_the_page() -> None:
    page = reference_pages.methods()
    for one in planning.available():
        assert f"\n| `{one.name}` | " in page
    for name in schedulers.rules():
        assert f"| `{reference_pages.rule_spec(name)}` |" in page
        schedulers.parse_rule(reference_pages.rule_spec(name))


def test_every_token_rule_is_on_both_pages() -> None:
    for name in tokens.token_rules():
        spec = reference_pages.spec_of(name, registry.load(tokens.RULES, name).fresh)
        assert f"| `{spec}` |" in reference_pages.methods()
        assert f"\n| `{name}` | " in (DOCS / "language-models.md").read_text()
        tokens.parse_token_rule(spec)


def test_every_public_name_has_an_entry() -> None:
    entries = set().union(*(documented(p.read_text()) for p in (DOCS / "reference" / "api").glob("*.md")))
    assert set(diffcache.__all__) - entries == set()


def test_a_missing_entry_is_noticed() -> None:
    assert documented("::: diffcache.accelerate\n\nsee diffcache.report\n") == {"accelerate"}


def test_every_error_has_an_entry_and_a_remedy() -> None:
    found = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.DiffCacheError) and kind is not errors.DiffCacheError
    }
    page = (DOCS / "reference" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    assert found - rows.keys() == set()
    assert all(rows[name].strip() for name in found)
    entries = documented((DOCS / "reference" / "api" / "errors.md").read_text())
    assert {f"errors.{name}" for name in found} <= entries


def test_the_citation_names_the_version() -> None:
    citation = (DOCS.parent / "CITATION.cff").read_text()
    assert f"\nversion: {diffcache.__version__}\n" in citation
