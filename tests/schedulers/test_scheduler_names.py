"""Names of methods: those of the papers, old ones, and how they are listed and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import command_of
from measurements import NEEDS_MORE, measurement, only

from diffcache import planning, registry, schedulers
from diffcache.documents import CacheSchedule
from diffcache.errors import UnknownName

MODULES = registry.modules(schedulers.__name__)
ALIASES = [(old, name, options) for name, m in MODULES.items() for old, options in getattr(m, "ALIASES", {}).items()]
PAPERS = (
    *("smoothcache", "ertacache", "magcache", "cachequant", "bac", "lemica", "meancache", "dpcache", "teacache"),
    *("firstblockcache", "easycache", "taylorseer", "zeus", "l2p", "fora", "learning_to_cache", "harmonica"),
    *("budcache", "cem", "otcache"),
)


def plans(schedule: CacheSchedule) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [(site, plan.compute, plan.weights) for _, site, plan in schedule.plans()]


@pytest.mark.parametrize("paper", PAPERS)
def test_a_method_has_a_file_called_what_its_paper_calls_it(paper: str) -> None:
    assert paper in schedulers.having("plan")
    assert schedulers.parse_spec(paper, "plan") == (paper, {})


@pytest.mark.parametrize(("old", "name", "options"), ALIASES, ids=[old for old, *_ in ALIASES])
def test_an_old_spec_makes_the_schedule_of_the_new_one(old: str, name: str, options: dict[str, object]) -> None:
    assert schedulers.parse_spec(old, "plan") == (name, options)
    if name in NEEDS_MORE:
        return
    new = name + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")
    one, other = (planning.plan(measurement(), spec, 5) for spec in (old, new))
    assert one == other
    assert plans(one)


def test_the_part_of_an_old_spec_may_be_given_as_an_option() -> None:
    one = planning.plan(measurement(), "threshold", 5, kind="magcache", most=3)
    assert one == planning.plan(measurement(), "magcache:most=3", 5)
    assert one != planning.plan(measurement(), "threshold", 5)
    with pytest.raises(UnknownName, match=r"no option of 'ertacache' called 'kind'"):
        planning.plan(measurement(), "threshold", 5, kind="slowcache")


@pytest.mark.parametrize(
    ("typed", "name"),
    [("TaylorSeer", "taylorseer"), ("Learning-to-Cache", "learning_to_cache"), ("L2C", "learning_to_cache")],
)
def test_case_and_hyphens_do_not_matter(typed: str, name: str) -> None:
    assert schedulers.parse_spec(typed, "plan")[0] == name


def test_an_old_rule_is_the_new_one() -> None:
    assert schedulers.Rule("taylor", options={"every": 3}) == schedulers.parse_rule("taylorseer:every=3")
    assert str(schedulers.parse_rule("first_block:threshold=0.1")) == "firstblockcache:threshold=0.1,sites=stack"
    assert schedulers.is_rule("taylor:every=3")
    assert not schedulers.is_rule("threshold:kind=magcache")
    assert not schedulers.is_rule("user/taylor")


@pytest.mark.parametrize("name", schedulers.having("plan"))
def test_a_scheduler_says_what_it_needs_and_where_it_is_listed(name: str) -> None:
    assert isinstance(MODULES[name].NEEDS, str)
    (found,) = [one for one in planning.available() if one.name == name]
    assert found.group in schedulers.GROUPS
    assert len(found.summary) <= 100
    assert set(found.demo_db) <= {"dit", "flux"}


def test_what_was_measured_on_the_demo_models_has_a_file() -> None:
    assert set().union(*(one.demo_db for one in planning.available())) == {"dit", "flux"}
    by_name = {one.name: one.demo_db for one in planning.available()}
    assert by_name["closed_loop"]["flux"] > by_name["uniform"]["flux"]


def test_schedulers_are_compared_on_one_profile() -> None:
    found = planning.compare(measurement(), 5)
    assert {one.name for one in found} == set(schedulers.having("plan"))
    simulated = [one.schedule.expected.mean_db for one in found if one.schedule and one.schedule.expected]
    assert len(simulated) > 6
    assert simulated == sorted(simulated, reverse=True)
    assert found[0].name == "closed_loop"
    for name in NEEDS_MORE:
        (one,) = [one for one in found if one.name == name]
        assert one.schedule is None
        assert "file" in one.reason
    without = {one.name: one for one in planning.compare(only(measurement(), "model"), 5)}
    assert without["smoothcache"].schedule is None
    assert "sublayer" in without["smoothcache"].reason
    assert without["magcache"].schedule is not None


def test_the_command_lists_compares_and_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command_of(monkeypatch, capsys)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("plan", "--list")
    assert code == 0
    groups = [line.split("\t")[-1].partition(",")[0] for line in out.splitlines()[1:]]
    named = [group for group in schedulers.GROUPS if group in groups]
    planning_files = [m for m in registry.modules("diffcache.schedulers").values() if hasattr(m, "plan")]
    there = {getattr(m, "GROUP", "published methods") for m in planning_files}
    assert named == [group for group in schedulers.GROUPS if group in there]
    assert list(dict.fromkeys(groups)) == [*named, "rules", "language models"]
    code, out, _ = run("plan", "--list", "--scheduler", "threshold:kind=magcache")
    assert out.startswith("magcache\n")
    assert "most=None" in out
    assert "arXiv 2506.09045" in out
    path = measurement().save(tmp_path / "profile.safetensors")
    code, out, _ = run("plan", "--compare", path, "--computed", 5)
    assert code == 0
    assert out.splitlines()[1].startswith("closed_loop\t")
    assert "cannot plan: " in out.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uniform", ["needs: any profile", "a rule without a profile", "options: every=2"]),
        ("dkv", ["a rule for language models", "options: refresh=8, prompt=refresh", "arXiv 2505.15781"]),
        ("closed-loop", ["needs: dynamics"]),
    ],
)
def test_the_command_describes_methods_and_rules(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command_of(monkeypatch, capsys)("plan", "--list", "--scheduler", name)
    assert code == 0
    for said in words:
        assert said in out


def test_the_error_about_a_method_that_needs_a_profile_names_the_next_step() -> None:
    with pytest.raises(UnknownName, match=r"'smoothcache' plans from a profile: .*plan PROFILE") as error:
        schedulers.parse_rule("smoothcache")
    assert "Did you mean" not in str(error.value)
