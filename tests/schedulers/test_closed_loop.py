"""The planner's simulation is the closed loop itself, wherever its assumptions hold; its search is what it says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from documents import dynamics, measured, profile, site
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.documents import Dynamics, Profile, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import closed_loop
from diffcache.schedulers.closed_loop import improve, plan, shifts, thinned
from diffcache.schedulers.uniform import evenly, reuse
from diffcache.simulation import ANCHORS, Simulator
from diffcache.simulation.simulator import MOST_DB

WIDTH = 40  # elements of a state, over all samples
SAMPLES = 2

Weigh = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


class Loop:
    """A sampler with explicit vectors. The network's answers are given: ``outputs`` [T, WIDTH], ``response`` times the
    state's error, and ``spread`` times its energy in a direction of the step's ``own``, at a right angle to all others.
    ``memory``: how much of the last output the sampler uses again, as multistep ones do."""

    def __init__(
        self, steps: int, seed: int, *, memory: float = 0.0, response: float = 0.0, spread: float = 0.0
    ) -> None:
        draw = np.random.default_rng(seed)
        self.outputs = np.cumsum(draw.normal(size=(steps, WIDTH)), axis=0) + 3 * draw.normal(size=WIDTH)
        self.keep = draw.uniform(0.8, 1.1, steps)
        self.gain = draw.uniform(-0.4, -0.1, steps)
        self.memory = memory
        self.response = response * draw.uniform(-1, 1, steps)
        self.spread = spread * draw.uniform(0, 1, steps)
        self.own = WIDTH**0.5 * np.linalg.qr(self.outputs.T, mode="complete")[0].T[steps : 2 * steps]
        self.begin = draw.normal(size=WIDTH)
        self.states = self.walk(self.outputs)

    def walk(self, handed: np.ndarray) -> np.ndarray:
        """The states after each step when these outputs are handed over, the network left out."""
        states, state, before = [], self.begin, 0 * self.begin
        for keep, gain, output in zip(self.keep, self.gain, handed, strict=True):
            state = keep * state + gain * output + self.memory * gain * before
            before = output
            states.append(state)
        return np.array(states)

    def dynamics(self) -> Dynamics:
        steps = len(self.outputs)
        nothing = self.walk(np.zeros((steps, WIDTH)))
        ones = [self.walk(np.repeat(row[:, None], WIDTH, 1)) - nothing for row in np.eye(steps)]
        parts = np.stack(np.split(self.outputs, SAMPLES, axis=1))
        grams = parts @ parts.transpose(0, 2, 1) * SAMPLES / WIDTH
        return Dynamics(
            grams=(grams + grams.transpose(0, 2, 1)) / 2,
            peaks=np.ptp(self.states[-1].reshape(SAMPLES, -1), axis=1),
            reach=np.stack([o[:, 0] for o in ones], 1),
            response=self.response,
            spread=self.spread,
        )

    def fitted(self, compute: np.ndarray, begins: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The closed loop with this mask, fitted by lstsq: weights, error [WIDTH] of the final state."""
        weights = np.zeros((len(compute), ANCHORS))

        def weigh(i: int, anchors: np.ndarray, rest: np.ndarray) -> np.ndarray:
            w, *_ = np.linalg.lstsq(self.gain[i] * anchors.T, rest, rcond=None)
            weights[i, : len(w)] = w
            return np.asarray(w)

        return weights, self.end(compute, weigh, ANCHORS, begins)

    def played(self, plan: SitePlan) -> np.ndarray:
        """The closed loop with the plan's own weights: error [WIDTH] of the final state."""
        scale = np.ones(len(plan.compute)) if plan.scale is None else plan.scale[0]
        keep = plan.weights.shape[2]
        return self.end(plan.compute, lambda i, anchors, _: scale[i] * plan.weights[0, i, : len(anchors)], keep)

    def end(self, compute: np.ndarray, weigh: Weigh, keep: int, begins: tuple[int, ...] = ()) -> np.ndarray:
        """``weigh``: (step, anchors [k, WIDTH], what the state after the step still misses) -> weights [k]."""
        handed: list[np.ndarray] = []
        anchors: list[np.ndarray] = []
        for i, computed in enumerate(compute):
            past = np.array([*handed, *np.zeros((len(compute) - i, WIDTH))])
            if computed:
                error = self.walk(past)[i - 1] - self.states[i - 1] if i else 0
                own = np.sqrt(self.spread[i] * np.mean(error**2)) * self.own[i]
                handed.append(self.outputs[i] + self.response[i] * error + own)
                anchors = [handed[i], *([] if i in begins else anchors)][:keep]
            else:
                w = weigh(i, np.stack(anchors), self.states[i] - self.walk(past)[i])
                handed.append(w @ np.stack(anchors))
        return np.asarray(self.walk(np.array(handed))[-1] - self.states[-1])


masks = st.lists(st.booleans(), min_size=1, max_size=9).map(lambda rest: np.array([True, *rest]))


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 99), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 2.0]))
def test_a_simulated_run_is_the_run(
    compute: np.ndarray, seed: int, memory: float, response: float, spread: float
) -> None:
    loop = Loop(len(compute), seed, memory=memory, response=response, spread=spread)
    weights, end = loop.fitted(compute)
    simulated = Simulator(loop.dynamics()).fitted(compute)
    assert simulated.error == pytest.approx((end**2).mean(), rel=1e-4, abs=1e-9)
    assert simulated.weights == pytest.approx(weights, rel=1e-3, abs=1e-4)
    assert simulated.end @ np.concatenate([loop.outputs, loop.own]) == pytest.approx(end, abs=1e-4)
    assert Simulator(loop.dynamics()).error(compute) == simulated.error


def test_doubt_is_how_much_of_the_spread_is_reckoned_with() -> None:
    loop, compute = Loop(10, 1, response=0.3, spread=4.0), evenly(10, 4)
    halved = dataclasses.replace(loop.dynamics(), spread=loop.spread / 2)
    believing = dataclasses.replace(loop.dynamics(), spread=np.zeros(10))
    for doubt, same in ((1.0, loop.dynamics()), (0.5, halved), (0.0, believing)):
        assert Simulator(loop.dynamics(), doubt=doubt).error(compute) == Simulator(same).error(compute)
    assert Simulator(believing).error(compute) < Simulator(halved).error(compute)


def test_the_simulation_sees_memory_and_response() -> None:
    """What a simulation that takes the sampler for a one-step one, or the network for deaf, would miss."""
    compute = evenly(10, 4)
    _, end = (loop := Loop(10, 0, memory=0.5, response=0.3)).fitted(compute)
    whole, error = loop.dynamics(), (end**2).mean()
    deaf = dataclasses.replace(whole, response=np.zeros(10))
    one_step = dataclasses.replace(whole, reach=Loop(10, 0).dynamics().reach)
    assert Simulator(whole).error(compute) == pytest.approx(error, rel=1e-4)
    assert Simulator(deaf).error(compute) != pytest.approx(error, rel=0.01)
    assert Simulator(one_step).error(compute) != pytest.approx(error, rel=0.01)


def test_a_denoiser_that_takes_over_has_no_anchors_yet() -> None:
    loop = Loop(8, 3)
    compute = np.array([letter == "■" for letter in "■■·■··■·"])
    weights, end = loop.fitted(compute, begins=(3,))
    simulated = Simulator(loop.dynamics(), first_steps=(3,)).fitted(compute)
    assert simulated.error == pytest.approx((end**2).mean(), rel=1e-6)
    assert simulated.weights == pytest.approx(weights, abs=1e-5)
    assert not simulated.weights[4:6, 1:].any()
    assert Simulator(loop.dynamics()).fitted(compute).weights[4:6, 1].all()


@given(st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_nothing_is_missing_when_all_is_computed(steps: int, seed: int) -> None:
    simulator = Simulator(Loop(steps, seed, response=0.3).dynamics())
    simulated = simulator.fitted(np.ones(steps, bool))
    assert simulated.error == 0
    assert not simulated.weights.any()
    assert (simulator.psnr_db(simulated) == MOST_DB).all()


def test_a_step_that_moves_nothing_reuses() -> None:
    still = dynamics(reach=np.zeros((6, 6)))
    compute = evenly(6, 2)
    assert Simulator(still).fitted(compute).weights.tolist() == [(~c * np.eye(ANCHORS)[0]).tolist() for c in compute]


def test_fewer_anchors_are_newer_anchors() -> None:
    loop, compute = Loop(8, 3), evenly(8, 5)
    two = Simulator(loop.dynamics(), anchors=2).fitted(compute)
    assert two.weights.shape == (8, 2)
    assert Simulator(loop.dynamics()).error(compute) < two.error < Simulator(loop.dynamics(), anchors=1).error(compute)


# Plans with various weights.


@st.composite
def played(draw: st.DrawFn) -> tuple[Loop, SitePlan]:
    """Any loop, and any plan that stays within what its simulation knows."""
    compute = draw(masks)
    steps, keep = len(compute), draw(st.integers(1, 3))
    draw_number = np.random.default_rng(draw(st.integers(0, 999)))
    exists = np.arange(keep) < np.cumsum(compute)[:, None]
    weights = np.where(exists & ~compute[:, None], draw_number.uniform(-1, 1, (steps, keep)) / keep, 0.0)
    scale = draw(st.sampled_from([None, draw_number.uniform(0.5, 1.5, (1, steps))]))
    plan = SitePlan(
        compute=compute, weights=weights[None], scale=scale, kappa=draw(st.none() | st.just(compute[None] + 0.0))
    )
    return Loop(steps, draw(st.integers(0, 99)), memory=draw(st.sampled_from([0.0, 0.5])), response=0.3), plan


@settings(max_examples=60, deadline=None)
@given(played())
def test_a_played_run_is_the_run_and_its_psnr_that_of_every_sample(drawn: tuple[Loop, SitePlan]) -> None:
    loop, plan = drawn
    end = loop.played(plan)
    simulator = Simulator(loop.dynamics())
    run = simulator.played(plan)
    assert run is not None
    assert run.error == pytest.approx((end**2).mean(), rel=1e-6, abs=1e-12)
    assert run.end @ np.concatenate([loop.outputs, loop.own]) == pytest.approx(end, abs=1e-8)
    reference = loop.states[-1].reshape(SAMPLES, -1)
    for psnr_db, missed, whole in zip(simulator.psnr_db(run), end.reshape(SAMPLES, -1), reference, strict=True):
        mse = (missed**2).mean()
        wanted = 20 * np.log10(whole.max() - whole.min()) - 10 * np.log10(mse) if mse > 1e-19 else MOST_DB
        assert psnr_db == pytest.approx(wanted, abs=1e-3) or mse < 1e-17


@settings(max_examples=30, deadline=None)
@given(masks, st.integers(0, 99))
def test_the_fitted_weights_played_are_the_fitted_run(compute: np.ndarray, seed: int) -> None:
    simulator = Simulator(Loop(len(compute), seed, memory=0.5, response=0.3).dynamics())
    fitted = simulator.fitted(compute)
    again = simulator.played(SitePlan(compute=compute, weights=fitted.weights[None]))
    assert again is not None
    assert np.array_equal(again.weights, fitted.weights)
    assert np.array_equal(again.end, fitted.end)
    assert again.error == fitted.error


def test_samples_are_distinguished() -> None:
    """One mean Gram table would give both the same decibels but for their peaks."""
    loop = Loop(10, 2)
    simulator = Simulator(loop.dynamics())
    run = simulator.played(reuse(evenly(10, 4)))
    assert run is not None
    alike = dataclasses.replace(loop.dynamics(), grams=np.repeat(simulator.dynamics.gram[None], SAMPLES, 0))
    assert not np.allclose(simulator.psnr_db(run), Simulator(alike).psnr_db(run), atol=0.01)


def test_a_sample_that_stays_where_it_began_has_no_range_and_no_infinity() -> None:
    flat = dynamics(peaks=np.zeros(2))
    simulator = Simulator(flat)
    run = simulator.played(reuse(evenly(6, 2)))
    assert run is not None
    assert np.isfinite(simulator.psnr_db(run)).all()


@pytest.mark.parametrize(
    "more",
    [
        {"kappa": np.ones((1, 6))},
        {"bias": np.ones((1, 6))},
        {"bias": np.ones((1, 6, 3))},
        {"scale": np.ones((1, 6, 3))},
        {"weights": np.repeat(reuse(evenly(6, 2)).weights, 2, axis=0)},
    ],
    ids=["drift of the input", "bias", "bias per channel", "scale per channel", "branches apart"],
)
def test_what_the_simulation_knows_nothing_of_is_not_played(more: dict[str, np.ndarray]) -> None:
    plain = reuse(evenly(6, 2))
    assert Simulator(dynamics()).played(plain) is not None
    assert Simulator(dynamics()).played(dataclasses.replace(plain, **more)) is None


# Choosing.


def costs(simulator: Simulator, computed: int) -> dict[bytes, float]:
    """Every mask there is."""
    found = {}
    for chosen in itertools.combinations(range(1, simulator.steps), computed - 1):
        compute = np.zeros(simulator.steps, bool)
        compute[[0, *chosen]] = True
        found[compute.tobytes()] = simulator.error(compute)
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 8).flatmap(lambda t: st.tuples(st.just(t), st.integers(2, t - 1))), st.integers(0, 999))
def test_improving_ends_where_no_move_helps_and_never_worsens(size: tuple[int, int], seed: int) -> None:
    steps, computed = size
    simulator = Simulator(Loop(steps, seed, response=0.2).dynamics())
    every, cost = costs(simulator, computed), simulator.error
    better = improve(evenly(steps, computed), cost)
    assert better[0]
    assert better.sum() == computed
    assert min(every.values()) <= cost(better) <= cost(evenly(steps, computed))
    for step in np.flatnonzero(better)[1:]:
        assert all(cost(other) >= cost(better) for other in shifts(better, int(step)) if other[0])


def test_the_best_of_all_masks_is_mostly_found_and_stays_where_it_is() -> None:
    found = 0
    for seed in range(20):
        simulator = Simulator(Loop(8, seed).dynamics())
        every = costs(simulator, 3)
        best = np.frombuffer(min(every, key=every.__getitem__), bool)
        assert np.array_equal(improve(best, simulator.error), best)
        better = improve(evenly(8, 3), simulator.error)
        found += bool(np.isclose(simulator.error(better), min(every.values())))
    assert 10 <= found < 20  # by single moves from the even mask: not always


def test_thinning_leaves_out_what_costs_least_one_by_one() -> None:
    worth = np.array([0, 5, 3, 8, 1, 2])

    def cost(compute: np.ndarray) -> float:
        return float(worth[~compute].sum())

    assert [np.flatnonzero(thinned(6, n, cost)).tolist() for n in (6, 4, 2, 1)] == [
        [*range(6)],
        [0, 1, 2, 3],
        [0, 3],
        [0],
    ]
    assert np.flatnonzero(thinned(6, 2, cost, fixed=(0, 4))).tolist() == [0, 4]
    simulator = Simulator(Loop(9, 4, response=0.2).dynamics())
    for computed in range(1, 9):
        more, fewer = (thinned(9, n, simulator.error) for n in (computed + 1, computed))
        (gone,) = np.flatnonzero(more & ~fewer)
        others = [more & (np.arange(9) != step) for step in np.flatnonzero(more)[1:]]
        assert gone
        assert simulator.error(fewer) == min(map(simulator.error, others))


def test_a_plan_starts_from_the_better_valley() -> None:
    """Thinned out, or the even mask: now the one, now the other ends lower."""
    better = set()
    for seed in range(20):
        loop = Loop(12, seed)
        error = Simulator(loop.dynamics()).error
        even, thin = (error(improve(start, error)) for start in (evenly(12, 4), thinned(12, 4, error)))
        better.add(np.sign(even - thin))
        assert error(plan(of(loop), 4).sites["model"].compute) == min(even, thin)
    assert {-1, 1} <= better


def test_improving_leaves_alone_what_is_fixed() -> None:
    def late(compute: np.ndarray) -> float:
        return float(-np.flatnonzero(compute).sum())

    start = evenly(8, 4, among=(3,))
    assert np.flatnonzero(improve(start, late, fixed=(0, 3))).tolist() == [0, 3, 6, 7]
    assert np.flatnonzero(improve(start, late)).tolist() == [0, 5, 6, 7]


@given(masks)
def test_moves_shift_one_computed_step(compute: np.ndarray) -> None:
    for step in map(int, np.flatnonzero(compute)):
        found = shifts(compute, step)
        assert len({c.tobytes() for c in found}) == len(found)
        for other in found:
            gone, came = np.flatnonzero(compute & ~other), np.flatnonzero(other & ~compute)
            assert gone.tolist() == [step]
            assert len(came) == 1
            assert 0 < abs(int(came[0]) - step) <= closed_loop.REACH


@given(st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))))
def test_an_even_mask_is_even(size: tuple[int, int]) -> None:
    steps, computed = size
    compute = evenly(steps, computed)
    assert compute[0]
    assert compute.sum() == computed
    gaps = np.diff([*np.flatnonzero(compute), steps])
    assert gaps.max() - gaps.min() <= 1


@given(st.integers(2, 20), st.data())
def test_an_even_mask_has_the_steps_that_must_be_among_it(steps: int, data: st.DataObject) -> None:
    among = data.draw(st.sets(st.integers(0, steps - 1), max_size=4))
    computed = data.draw(st.integers(len(among | {0}), steps))
    compute = evenly(steps, computed, among)
    assert compute.sum() == computed
    assert compute[[0, *among]].all()
    with pytest.raises(BadOption, match=f"Allowed: {len(among | {0})} to {steps}"):
        evenly(steps, len(among | {0}) - 1, among)


# From a profile to a plan.


def of(loop: Loop, **changes: object) -> Profile:
    steps = len(loop.outputs)
    fields: dict[str, object] = {
        "steps": steps,
        "start": 0,
        "timesteps": np.linspace(999, 1, steps),
        "sigmas": None,
        "denoisers": {"transformer": measured(site(loop.outputs[None]))},
        "dynamics": loop.dynamics(),
    }
    return profile(**fields | changes)


@pytest.mark.parametrize("computed", [1, 2, 5, 12])
def test_a_plan_is_an_improved_mask_with_the_simulated_weights(computed: int) -> None:
    loop = Loop(12, 1, response=0.2)
    simulator = Simulator(loop.dynamics())
    planned = plan(of(loop), computed)
    assert list(planned.sites) == ["model"]
    found = planned.sites["model"]
    assert found.steps_computed == computed
    assert simulator.error(found.compute) <= simulator.error(improve(evenly(12, computed), simulator.error))
    assert np.array_equal(improve(found.compute, simulator.error), found.compute)  # no single move helps
    assert np.array_equal(found.weights[0], simulator.fitted(found.compute).weights)
    assert planned.expected is not None
    assert planned.expected.origin == "simulated"
    assert planned.expected.samples == SAMPLES
    psnr_db = simulator.psnr_db(simulator.fitted(found.compute))
    assert planned.expected.mean_db == pytest.approx(psnr_db.mean())
    assert (planned.sigmas, planned.online) == (None, None)


@pytest.mark.parametrize("anchors", [1, 3])
def test_a_plan_keeps_no_more_anchors_than_it_is_given(anchors: int) -> None:
    loop = Loop(12, 1, response=0.2)
    found = plan(of(loop), 6, anchors=anchors).sites["model"]
    assert found.anchors == anchors
    assert plan(of(loop), 6).sites["model"].anchors > anchors
    assert np.array_equal(found.weights[0], Simulator(loop.dynamics(), anchors=anchors).fitted(found.compute).weights)


def test_what_cannot_be_planned_is_refused() -> None:
    loop = Loop(8, 1)
    with pytest.raises(BadOption, match="it has no dynamics \\(none were measured\\)"):
        plan(of(loop, dynamics=None), 3)
    with pytest.raises(BadOption, match="it has no dynamics \\(it clips\\)"):
        plan(of(loop, dynamics=None, provenance={"no_dynamics": "it clips"}), 3)
    for computed in (0, 9, 2.5):
        with pytest.raises(BadOption, match=r"computed_steps=.* Allowed: 1 to 8"):
            plan(of(loop), computed)
    with pytest.raises(BadOption, match=r"anchors=0 was given\. Allowed: 1 or more"):
        plan(of(loop), 3, anchors=0)
