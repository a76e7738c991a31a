"""From a profile and a budget to a schedule: every goal is met exactly, or refused with what is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import DIGEST, dynamics, hold, measured, online, profile, site
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.documents import Budget, CacheSchedule, DenoiserProfile, Expected, Profile, SitePlan
from diffcache.errors import BadOption, UnknownName
from diffcache.executor import Anchor, Output, Store
from diffcache.executor.program import compile_plan
from diffcache.planning import available, cache_bytes, expected, plan, steps_for_speedup
from diffcache.schedulers import Planned, closed_loop, having, taylorseer, uniform
from diffcache.schedulers.uniform import evenly, reuse
from diffcache.simulation import Simulator

pytestmark = pytest.mark.fast

BYTES = 4096  # of one output


def measurement(steps: int = 12, seed: int = 0, **changes: Any) -> Profile:
    """Outputs of two samples on random walks; nothing measured starts late."""
    walks = np.random.default_rng(seed).normal(size=(2, steps, 30)).cumsum(axis=1)
    grams = walks @ walks.transpose(0, 2, 1) / 30
    fields: dict[str, Any] = {
        "steps": steps,
        "start": 0,
        "guidance": None,
        "denoisers": {"transformer": measured(site(walks[:1], output_bytes=BYTES))},
        "dynamics": dynamics(steps, grams=(grams + grams.transpose(0, 2, 1)) / 2, peaks=np.ptp(walks[:, -1], axis=1)),
    }
    return profile(**fields | changes)


def clock(seconds: float, call: float, calls: int = 1, steps: int = 50) -> Profile:
    """A profile of a loop that takes so long, and in which a call of the denoiser does."""
    model = site(np.ones((1, steps, 2)), seconds=call, calls=calls)
    return measurement(steps, seconds=seconds, denoisers={"transformer": measured(model)})


def the_plan(schedule: CacheSchedule) -> SitePlan:
    ((_, denoiser),) = schedule.denoisers.items()
    return denoiser.sites["model"]


# The schedule that is made.


def test_a_schedule_belongs_to_what_was_measured(tmp_path: Path) -> None:
    found = measurement()
    made = plan(found, "closed_loop:anchors=3", 4)
    assert made.steps == 12
    assert made.denoisers["transformer"].class_name == "Net"
    assert made.denoisers["transformer"].config_digest == DIGEST
    assert made.noise_scheduler == found.noise_scheduler
    assert made.guidance == found.guidance
    assert np.array_equal(made.timesteps, found.timesteps)  # type: ignore[arg-type]
    assert made.provenance == {
        "budget": "computed_steps 4",
        "profile": found.digest(),
        "scheduler": "closed_loop:anchors=3",
    }
    again = plan(Profile.load(found.save(tmp_path / "profile.safetensors")), "closed_loop", 4, anchors=3)
    assert again.to_bytes() == made.to_bytes()
    assert CacheSchedule.load(made.save(tmp_path / "schedule.safetensors")) == made


def test_the_plan_is_the_schedulers() -> None:
    found = measurement()
    assert the_plan(plan(found, "closed_loop", 5)) == closed_loop.plan(found, 5).sites["model"]
    assert the_plan(plan(found, "taylorseer:order=2", 5)) == taylorseer.plan(found, 5, order=2).sites["model"]
    assert the_plan(plan(found, "taylorseer", 5, order=2)) == taylorseer.plan(found, 5, order=2).sites["model"]


@pytest.mark.parametrize("scheduler", ["uniform", "taylorseer", "closed_loop"])
@pytest.mark.parametrize("computed", [1, 5, 12])
def test_as_many_steps_are_computed_as_the_budget_says(scheduler: str, computed: int) -> None:
    made = plan(measurement(), scheduler, computed)
    assert made.computed_steps == computed
    assert plan(measurement(), scheduler, Budget(computed_steps=float(computed))) == made


def test_what_to_expect_is_the_simulation_of_the_plan() -> None:
    found = measurement()
    for scheduler in ("uniform", "taylorseer", "closed_loop"):
        made = plan(found, scheduler, 5)
        simulator = Simulator(found.dynamics)  # type: ignore[arg-type]
        run = simulator.played(the_plan(made))
        assert run is not None
        assert made.expected == Expected.over(simulator.psnr_db(run), "simulated")


def test_nothing_is_expected_of_what_cannot_be_simulated() -> None:
    found, plain = measurement(6), hold("■·■·■·")
    assert expected(found, Planned(sites={"model": plain})) is not None
    assert expected(measurement(6, dynamics=None), Planned(sites={"model": plain})) is None
    assert expected(found, Planned(sites={"model": plain}, online=online())) is None
    assert expected(found, Planned(sites={"model": plain}, sigmas=np.linspace(1, 0, 7))) is None
    assert expected(found, Planned(sites={"block:b.0": plain})) is None
    assert expected(found, Planned(sites={"model": hold("■·■·■·", bias=np.ones((1, 6)))})) is None


def stub(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """``uniform`` decides this as well."""
    original = uniform.plan
    monkeypatch.setattr(uniform, "plan", lambda profile, n: Planned(**{"sites": original(profile, n).sites} | fields))


def test_a_scheduler_that_knows_better_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Expected(mean_db=33, low_db=30, high_db=35, samples=9, origin="held-out")
    stub(monkeypatch, expected=known, notes={"cuts": "three", "budget": "its own"})
    made = plan(measurement(), "uniform", 4)
    assert made.expected == known
    assert made.provenance["cuts"] == "three"
    assert made.provenance["budget"] == "computed_steps 4"


def test_a_loop_that_starts_late_is_planned_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    late, early = (plan(measurement(8, start=start), "closed_loop", 3) for start in (3, 0))
    assert (late.steps, late.timesteps) == (11, None)
    assert the_plan(late).compute[:3].all()
    assert np.array_equal(the_plan(late).compute[3:], the_plan(early).compute)
    assert np.array_equal(the_plan(late).weights[:, 3:], the_plan(early).weights)
    assert not the_plan(late).weights[:, :3].any()

    rows = {"kappa": np.ones((1, 8)), "scale": np.full((1, 8), 2.0), "bias": np.ones((1, 8, 3))}
    rule = online(limit=np.linspace(1, 2, 8))
    stub(monkeypatch, sites={"model": hold("■··■··■·", **rows)}, online=rule)
    made = plan(measurement(8, start=3), "uniform", 3)
    for name, row in rows.items():
        assert np.array_equal(getattr(the_plan(made), name)[:, 3:], row)
    (denoiser,) = made.denoisers.values()
    assert denoiser.online is not None
    assert denoiser.online.limit.tolist() == [0, 0, 0, *rule.limit]
    assert np.array_equal(denoiser.online.polynomial, rule.polynomial)  # type: ignore[arg-type]


# Goals.


@pytest.mark.parametrize("computed", [12.5, 13, 99])
def test_more_steps_than_there_are_cannot_be_computed(computed: float) -> None:
    with pytest.raises(BadOption, match=rf"computed_steps={computed} was given. Allowed: 1 to 12, the steps of the"):
        plan(measurement(), "uniform", computed)


def test_a_fraction_of_a_step_is_for_schedulers_that_know_what_to_do_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match=r"computed_steps=4.5 was given"):
        plan(measurement(), "closed_loop", 4.5)
    asked = []
    monkeypatch.setattr(uniform, "plan", lambda p, n: asked.append(n) or Planned(sites={"model": hold("■·")}))
    plan(measurement(2), "uniform", 1.5)
    plan(measurement(2), "uniform", 2.0)
    assert asked == [1.5, 2]
    assert type(asked[1]) is int


@pytest.mark.parametrize(
    ("seconds", "call", "calls", "speedup", "computed"),
    [
        pytest.param(10.0, 0.2, 1, 2.0, 25, id="the denoiser is all that costs"),
        pytest.param(10.0, 0.2, 1, 1.0, 50, id="no faster at all"),
        pytest.param(10.0, 0.18, 1, 2.0, 22, id="a tenth of the loop is not the denoiser"),  # (5 - 1) / 0.18 = 22.2
        pytest.param(10.0, 0.09, 2, 2.0, 22, id="two calls a step"),
        pytest.param(10.0, 0.18, 1, 8.0, 1, id="almost as fast as can be"),  # (1.25 - 1) / 0.18 = 1.4
        pytest.param(10.0, 0.3, 1, 2.0, 25, id="a median above the mean"),
        pytest.param(10.0, 0.2, 1, 50 / 22, 22, id="as much as is allowed, though 1/5 is no binary number"),
    ],
)
def test_a_speedup_is_reckoned_from_the_seconds_measured(
    seconds: float, call: float, calls: int, speedup: float, computed: int
) -> None:
    assert steps_for_speedup(clock(seconds, call, calls), speedup) == computed
    assert plan(clock(seconds, call, calls), "uniform", Budget(speedup=speedup)).computed_steps == computed


@given(st.floats(0.5, 20), st.floats(0.001, 0.1), st.floats(0, 3), st.integers(1, 30))
def test_a_speedup_takes_as_many_steps_as_the_clock_allows(
    speedup: float, call: float, rest: float, steps: int
) -> None:
    whole = rest + steps * call
    fits = [n for n in range(1, steps + 1) if rest + n * call <= whole / speedup * (1 + 1e-12)]
    found = clock(whole, call, steps=steps)
    if fits:
        assert steps_for_speedup(found, speedup) in (max(fits), min(steps, max(fits) + 1))
        assert rest + steps_for_speedup(found, speedup) * call <= whole / speedup + 1e-8 * whole
    else:
        with pytest.raises(BadOption, match=rf"Allowed: up to {whole / (rest + call):.2f}, with one computed step of"):
            steps_for_speedup(found, speedup)


def test_a_speedup_needs_a_clock() -> None:
    inside = DenoiserProfile(class_name="Net", sites={"block:b.0": site(np.ones((1, 50, 2)))})
    for found in (
        clock(0.0, 0.1),
        clock(10.0, 0.0),
        measurement(50, seconds=10.0, denoisers={"transformer": inside}),
    ):
        with pytest.raises(BadOption, match=r"speedup cannot be used: this profile did not measure the seconds"):
            plan(found, "uniform", Budget(speedup=2))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.floats(5, 60), st.sampled_from(["uniform", "taylorseer"]))
def test_the_cheapest_plan_is_the_first_that_is_good_enough(steps: int, seed: int, least_db: float, name: str) -> None:
    found = measurement(steps, seed)
    every = [plan(found, name, n) for n in range(1, steps + 1)]
    good = [made for made in every if made.expected.mean_db >= least_db]  # type: ignore[union-attr]
    made = plan(found, name, Budget(min_psnr_db=least_db))
    assert the_plan(made) == the_plan(good[0])
    assert made.provenance["budget"] == f"min_psnr_db {least_db:g}"


def test_fidelity_that_falls_where_a_step_is_added_does_not_mislead() -> None:
    """A search that takes it for rising would miss the few steps that do."""
    found = measurement(12, 3)
    fidelity = [plan(found, "taylorseer", n).expected.mean_db for n in range(1, 13)]  # type: ignore[union-attr]
    peak = next(
        n for n in range(11) if fidelity[n] > max(fidelity[:n], default=-np.inf) and fidelity[n] > fidelity[n + 1]
    )
    made = plan(found, "taylorseer", Budget(min_psnr_db=fidelity[peak]))
    assert made.computed_steps == peak + 1


def test_counts_that_a_scheduler_cannot_do_with_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(profile: Profile, computed_steps: float) -> Planned:
        if computed_steps < 4:
            raise BadOption("computed_steps", computed_steps, "4 or more")
        return Planned(sites={"model": reuse(evenly(profile.steps, computed_steps))})

    monkeypatch.setattr(uniform, "plan", picky)
    assert plan(measurement(), "uniform", Budget(min_psnr_db=0)).computed_steps == 4
    with pytest.raises(BadOption, match=r"computed_steps=3 was given\. Allowed: 4 or more"):
        plan(measurement(3), "uniform", Budget(min_psnr_db=0))


def test_fidelity_out_of_reach_says_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BadOption, match=r"min_psnr_db=300 was given. Allowed: up to 144.5 \(exact\), at 12 computed steps"
    ):
        plan(measurement(), "uniform", Budget(min_psnr_db=300))
    best = {4: 31.0, 5: 47.25}
    monkeypatch.setattr(
        uniform,
        "plan",
        lambda p, n: Planned(
            sites={"model": reuse(evenly(p.steps, n))},
            expected=Expected(mean_db=best.get(n, 20), low_db=0, high_db=99, samples=1, origin="calibration"),
        ),
    )
    with pytest.raises(BadOption, match=r"Allowed: up to 47\.2, at 5 computed steps"):
        plan(measurement(), "uniform", Budget(min_psnr_db=48))


def test_a_goal_of_fidelity_is_refused_if_the_plan_cannot_be_simulated() -> None:
    with pytest.raises(BadOption, match=r"min_psnr_db cannot be used: the final state of this plan"):
        plan(measurement(dynamics=None), "uniform", Budget(min_psnr_db=40))


# Memory.


@st.composite
def site_plans(draw: st.DrawFn, steps: int = 8) -> SitePlan:
    """Any mask, weights with holes, inputs needed here and there."""
    compute = np.array([True, *draw(st.lists(st.booleans(), min_size=steps - 1, max_size=steps - 1))])
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    weights = random.normal(size=(1, steps, 4)) * (random.random((1, steps, 4)) < 0.5)
    weights *= ~compute[:, None] & (np.arange(4) < np.cumsum(compute)[:, None])
    kappa = random.normal(size=(1, steps)) * (random.random((1, steps)) < draw(st.sampled_from([0.0, 0.3])))
    kappa += ~weights.any(axis=2)  # or nothing would speak
    return SitePlan(compute=compute, weights=weights, kappa=kappa)


def life(plans: dict[str, SitePlan], size: int) -> int:
    """Most bytes that the executor's store holds when it runs these plans."""
    programs, store = {name: compile_plan(plan) for name, plan in plans.items()}, Store()
    for step in range(8):
        for name, program in programs.items():
            if program.terms[step] is None and step in program.keeps:
                tensor = torch.zeros(size, dtype=torch.uint8)
                store.put(name, step, Anchor.of(Output.of(tensor), (tensor,) * (step in program.keeps_x), ()))
        for name, program in programs.items():
            for anchor in program.drops[step]:
                store.drop(name, anchor)
    assert store.bytes == 0
    return store.peak_bytes


@settings(deadline=None)
@given(site_plans(), site_plans())
def test_bytes_are_those_that_the_store_will_hold(one: SitePlan, other: SitePlan) -> None:
    plans = {"block:b.0": one, "block:b.1": other}
    sites = {name: site(np.ones((1, 8, 2)), output_bytes=10) for name in plans}
    found = measurement(8, denoisers={"transformer": DenoiserProfile(class_name="Net", sites=sites)})
    assert cache_bytes(found, Planned(sites=plans)) == life(plans, 10)


def test_every_call_of_a_step_keeps_its_own() -> None:
    twice = measured(site(np.ones((1, 6, 2)), output_bytes=10, calls=2))
    held = Planned(sites={"model": hold("■·■·■·")})
    assert cache_bytes(measurement(6, denoisers={"transformer": twice}), held) == 20
    assert cache_bytes(measurement(6), Planned(sites={"model": hold("■■■■■■")})) == 0


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_anchors_are_given_up_until_the_plan_fits(room: int) -> None:
    found = measurement()
    assert plan(found, "closed_loop", Budget(computed_steps=6)).provenance["scheduler"] == "closed_loop"
    made = plan(found, "closed_loop", Budget(computed_steps=6, memory_bytes=room * BYTES + BYTES // 2))
    assert the_plan(made).anchors == room
    assert the_plan(made) == closed_loop.plan(found, 6, anchors=room).sites["model"]
    assert made.provenance["scheduler"] == f"closed_loop:anchors={room}"
    assert made.provenance["budget"] == f"computed_steps 6, memory_bytes {room * BYTES + BYTES // 2}"
    assert plan(found, made.provenance["scheduler"], 6).denoisers == made.denoisers  # can be had again


def test_what_fits_is_left_as_it_is() -> None:
    made = plan(measurement(), "closed_loop:anchors=2", Budget(computed_steps=6, memory_bytes=5 * BYTES))
    assert the_plan(made).anchors == 2
    everything = Budget(computed_steps=12, memory_bytes=0)
    assert plan(measurement(), "closed_loop", everything).computed_steps == 12


def test_a_memory_limit_combines_with_a_goal_of_fidelity() -> None:
    """A plan that needs more anchors than memory allows takes more steps."""
    found = measurement()
    roomy = plan(found, "closed_loop", Budget(min_psnr_db=39))
    tight = plan(found, "closed_loop", Budget(min_psnr_db=39, memory_bytes=BYTES))
    assert the_plan(tight).anchors == 1
    assert tight.expected.mean_db >= 39  # type: ignore[union-attr]
    assert tight.computed_steps > roomy.computed_steps


def test_memory_that_no_plan_could_do_with_says_how_much_is_needed() -> None:
    with pytest.raises(
        BadOption, match=r"memory_bytes=99 was given. Allowed: 4096 or more, the bytes that closed_loop keeps with o"
    ):
        plan(measurement(), "closed_loop", Budget(computed_steps=6, memory_bytes=99))
    with pytest.raises(BadOption, match=r"Allowed: 8192 or more, the bytes that taylorseer keeps at 6 computed steps"):
        plan(measurement(), "taylorseer", Budget(computed_steps=6, memory_bytes=BYTES))
    assert plan(measurement(), "taylorseer", Budget(computed_steps=6, memory_bytes=2 * BYTES)).computed_steps == 6


# What is refused for every budget.


def test_names_and_options_that_are_not_there() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'uniform'"):
        plan(measurement(), "unifrom", 4)
    with pytest.raises(UnknownName, match=r"no option of 'taylorseer' called 'every'\. Known: order"):
        plan(measurement(), "taylorseer:every=3", 4)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("closed_loop:anchors=two", "anchors='two' was given. Allowed: a whole number, such as 6"),
        ("closed_loop:anchors=2.5", "anchors=2.5 was given. Allowed: a whole number, such as 6"),
        ("closed_loop:anchors=nan", "anchors=nan was given. Allowed: a whole number, such as 6"),
        ("taylorseer:order=1e0", "order=1.0 was given. Allowed: a whole number, such as 1"),
    ],
)
def test_an_option_of_another_type_is_refused_for_every_scheduler(scheduler: str, words: str) -> None:
    with pytest.raises(BadOption) as refused:
        plan(measurement(), scheduler, 4)
    assert words in str(refused.value)


def test_numbers_may_be_numpys_and_a_whole_number_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_strength(profile: Profile, computed_steps: float, *, strength: float = 0.5, name: str = "a") -> Planned:
        return Planned(sites={"model": reuse(evenly(profile.steps, computed_steps))}, notes={"s": repr(strength)})

    assert plan(measurement(), "closed_loop", 4, anchors=np.int64(2)).computed_steps == 4
    monkeypatch.setattr(uniform, "plan", with_strength)
    monkeypatch.setitem(with_strength.__annotations__, "strength", float)
    assert plan(measurement(), "uniform:strength=1", 4).provenance["s"] == "1"
    for spec, words in (
        ("strength=much", "a number, such as 0.5"),
        ("strength=inf", "a number"),
        ("name=3", "text, such"),
    ):
        with pytest.raises(BadOption, match=words):
            plan(measurement(), f"uniform:{spec}", 4)
    with pytest.raises(BadOption, match=r"strength=True was given\. Allowed: a number"):
        plan(measurement(), "uniform", 4, strength=True)


def test_a_profile_of_several_denoisers_is_refused() -> None:
    two = dict.fromkeys(("transformer", "transformer_2"), measured(site(np.ones((1, 12, 2)))))
    with pytest.raises(BadOption, match="it holds 2 denoisers: transformer, transformer_2"):
        plan(measurement(denoisers=two), "uniform", 4)


# The list.


def test_every_scheduler_that_plans_is_listed_with_its_options() -> None:
    found = {scheduler.name: scheduler for scheduler in available()}
    assert set(found) == set(having("plan"))
    assert found["closed_loop"].options == {"anchors": 6}
    assert found["uniform"].options == {}
    assert found["taylorseer"].source == taylorseer.SOURCE
    assert found["closed_loop"].summary == (
        "Computed steps and weights whose simulated run ends nearest to the full run (this project)."
    )
    for scheduler in found.values():
        assert scheduler.summary
        assert "\n" not in scheduler.summary
