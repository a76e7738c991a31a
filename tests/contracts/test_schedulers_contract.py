"""What every scheduler that plans keeps to. It walks the folder: a new file is held to it without being named here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import pytest
from measurements import NEEDS_MORE, STEPS, each_site, measurement, only

from diffcache import registry, schedulers
from diffcache.documents import (
    Budget,
    CacheSchedule,
    Profile,
)
from diffcache.errors import BadOption
from diffcache.planning import available, cache_bytes, plan
from diffcache.schedulers import Planned

BUDGETS = (4, 7, STEPS)
NAMES = schedulers.having("plan")
# In addition to the default options of each scheduler.
MORE = (
    "smoothcache:sites=block",
    "ertacache:sites=stack",
    "bac:n=0",
    "cachequant:norm=coherent",
    "cachequant:norm=l2,sites=block,bounded=0",
    "bac:n=2",
    "meancache:edge=local",
)
SPECS = [spec for spec in (*NAMES, *MORE) if spec.partition(":")[0] not in NEEDS_MORE]

every_spec = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture(scope="module")
def found() -> Profile:
    return measurement()


def work(found: Profile, made: CacheSchedule) -> float:
    """In full steps, of the sites that are planned: by the time of what is computed."""
    measured = found.denoisers["transformer"].sites
    time = {name: measured[name].seconds * measured[name].calls for _, name, _ in made.plans()}
    return sum(time[name] * plan.steps_computed for _, name, plan in made.plans()) / sum(time.values())


@functools.cache
def made(spec: str, budget: float) -> CacheSchedule:
    return plan(measurement(), spec, budget)


# What they say of themselves.


@pytest.mark.parametrize("name", NAMES)
def test_it_says_where_it_comes_from_and_in_one_line_what_it_does(name: str) -> None:
    (described,) = [s for s in available() if s.name == name]
    assert described.source.strip()
    first, *rest = (registry.load(schedulers.__name__, name).__doc__ or "").strip().split("\n")
    assert first.endswith(".")
    assert not rest or not rest[0], "one line, then an empty one"
    assert described.summary == first


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_a_profile_a_budget_and_options_by_keyword(name: str) -> None:
    profile, computed_steps, *options = inspect.signature(schedulers.function(name, "plan", [])).parameters.values()
    assert (profile.name, computed_steps.name) == ("profile", "computed_steps")
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    if name not in NEEDS_MORE:
        assert all(option.default is not option.empty for option in options)


def test_what_is_left_out_is_there() -> None:
    """An exception for a file that does not exist (any more) would have no effect, so it is refused."""
    assert set(NEEDS_MORE) <= set(NAMES)


# What they make.


@every_spec
@pytest.mark.parametrize("budget", BUDGETS)
def test_it_makes_a_whole_document_within_the_budget(spec: str, budget: int, found: Profile) -> None:
    schedule = made(spec, budget)
    assert schedule.steps == found.steps
    assert CacheSchedule.from_bytes(schedule.to_bytes()) == schedule
    assert schedule.provenance["scheduler"].partition(":")[0] == spec.partition(":")[0]
    denoiser = schedule.denoisers["transformer"]
    assert set(denoiser.sites) <= set(found.denoisers["transformer"].sites)
    for plan_ in denoiser.sites.values():
        assert plan_.compute[0]
    if denoiser.online is None:
        assert work(found, schedule) <= budget + 1e-6
    else:  # what the run itself will do is not known; what it must do is
        assert max(plan_.steps_computed for plan_ in denoiser.sites.values()) <= budget


@every_spec
def test_it_spends_what_it_is_given(spec: str, found: Profile) -> None:
    """Otherwise one that computes the first step alone would keep to every budget."""
    if made(spec, 4).denoisers["transformer"].online is None:
        assert work(found, made(spec, 4)) > 2
        assert work(found, made(spec, 7)) > work(found, made(spec, 4))


@every_spec
def test_it_does_the_same_again(spec: str, found: Profile) -> None:
    assert plan(found, spec, 7).to_bytes() == made(spec, 7).to_bytes()


@every_spec
def test_it_does_not_look_at_where_the_profile_came_from(spec: str, found: Profile) -> None:
    """A profile that was saved and loaded, with other provenance, gives the same decisions."""
    again = dataclasses.replace(Profile.from_bytes(found.to_bytes()), provenance={"prompts": "others"})
    assert plan(again, spec, 7).denoisers == made(spec, 7).denoisers


@every_spec
def test_it_plans_for_loops_that_start_late(spec: str) -> None:
    late = measurement(start=5)
    try:
        schedule = plan(late, spec, 7)
    except BadOption as error:
        assert "start" in str(error)  # noqa: PT017
        return
    assert schedule.steps == 5 + STEPS
    assert all(plan_.compute[:6].all() for _, _, plan_ in schedule.plans())


# Budgets.


@every_spec
@pytest.mark.parametrize("budget", [0, STEPS + 1, -1, float("nan")])
def test_a_number_of_steps_that_cannot_be_is_refused(spec: str, budget: float, found: Profile) -> None:
    with pytest.raises(BadOption, match="computed_steps"):
        plan(found, spec, budget)


@every_spec
@pytest.mark.parametrize("budget", [0, STEPS + 1])
def test_it_refuses_such_a_number_without_the_front_too(spec: str, budget: int, found: Profile) -> None:
    name, options = schedulers.parse_spec(spec, "plan")
    try:
        planned: Planned = schedulers.function(name, "plan", options)(found, budget, **options)
    except BadOption:
        return
    # One that plans work rather than steps may well do all of it, if it is given more than there is.
    assert budget > STEPS
    assert planned.online or all(plan_.compute.all() for plan_ in planned.sites.values())


@every_spec
def test_an_impossible_speedup_is_refused(spec: str, found: Profile) -> None:
    with pytest.raises(BadOption, match="speedup"):
        plan(found, spec, Budget(speedup=1000))


@every_spec
def test_no_memory_at_all_is_refused(spec: str, found: Profile) -> None:
    with pytest.raises(BadOption, match="memory_bytes"):
        plan(found, spec, Budget(computed_steps=7, memory_bytes=0))


@every_spec
def test_enough_memory_changes_nothing(spec: str, found: Profile) -> None:
    enough = Budget(computed_steps=7, memory_bytes=1 << 40)
    assert plan(found, spec, enough).denoisers == made(spec, 7).denoisers


@every_spec
def test_a_limit_that_is_met_is_kept_to(spec: str, found: Profile) -> None:
    """Where fewer anchors keep less, there are fewer; else the limit is refused, with what would do."""
    denoiser = made(spec, 7).denoisers["transformer"]
    needed = cache_bytes(found, Planned(sites=denoiser.sites, online=denoiser.online))
    try:
        schedule = plan(found, spec, Budget(computed_steps=7, memory_bytes=needed - 1))
    except BadOption as error:
        assert error.name == "memory_bytes"  # noqa: PT017
        return
    denoiser = schedule.denoisers["transformer"]
    assert cache_bytes(found, Planned(sites=denoiser.sites, online=denoiser.online)) < needed


@every_spec
def test_a_least_fidelity_is_met_or_the_reason_is_given(spec: str, found: Profile) -> None:
    wanted = made(spec, 7).expected
    if wanted is None:
        with pytest.raises(BadOption, match="min_psnr_db"):
            plan(found, spec, Budget(min_psnr_db=20))
        return
    schedule = plan(found, spec, Budget(min_psnr_db=wanted.mean_db))
    assert schedule.expected is not None
    assert schedule.expected.mean_db >= wanted.mean_db
    assert schedule.computed_steps <= 7


# Profiles that lack something.

LACKING: dict[str, tuple[Callable[[Profile], Profile], str]] = {
    "dynamics": (lambda p: dataclasses.replace(p, dynamics=None), "dynamics"),
    "residuals": (lambda p: each_site(p, residual=None, residual_ratio=None), "residual"),
    "modulated inputs": (lambda p: each_site(p, modulated_change=None), "modulated"),
    "influence": (lambda p: each_site(p, influence=None), "influence"),
    "noise levels": (lambda p: dataclasses.replace(p, sigmas=None), "noise levels|sigmas"),
    "inner sites": (lambda p: only(p, "model"), "sublayer|block|stack"),
    "the model": (lambda p: only(p, "stack", "block", "sublayer"), "model"),
    "time": (lambda p: each_site(p, seconds=0.0), "seconds"),
    "costs": (lambda p: each_site(p, seconds=0.0, flops=0), "seconds|flops|cost"),
}


@every_spec
@pytest.mark.parametrize("what", LACKING)
def test_a_profile_that_lacks_what_it_needs_is_refused_with_its_name(spec: str, what: str, found: Profile) -> None:
    without, words = LACKING[what]
    try:
        schedule = plan(without(found), spec, 7)
    except BadOption as error:
        assert any(word in str(error) for word in words.split("|")), error  # noqa: PT017
    else:
        assert schedule.steps == found.steps


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("path", "dynamics"),
        ("closed_loop", "dynamics"),
        ("threshold", "residuals"),
        ("magcache", "residuals"),
        ("smoothcache", "inner sites"),
        ("bac:n=0", "inner sites"),
        ("bubbling", "inner sites"),
        ("partition", "the model"),
    ],
)
def test_what_is_known_to_be_needed_is_missed(spec: str, what: str, found: Profile) -> None:
    """The test above would pass for schedulers that make something up."""
    with pytest.raises(BadOption):
        plan(LACKING[what][0](found), spec, 7)
