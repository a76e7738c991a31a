"""The planner's simulation is the closed loop itself, wherever its assumptions hold; its search is what it says."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
from documents import DIGEST, dynamics, measured, profile, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.errors import BadOption
from diffcache.profile import DenoiserProfile, Dynamics, Profile
from diffcache.schedule import CacheSchedule
from diffcache.schedulers import closed_loop
from diffcache.schedulers.closed_loop import ANCHORS, final_error, improve, plan, shifts, simulate
from diffcache.schedulers.uniform import evenly

WIDTH = 40  # elements of a state


class Loop:
    """A sampler with explicit vectors. The network's answers are given: ``outputs`` [T, WIDTH], and ``response`` times
    the state's error. ``memory``: how much of the last output the sampler uses again, as multistep ones do."""

    def __init__(self, steps: int, seed: int, *, memory: float = 0.0, response: float = 0.0) -> None:
        draw = np.random.default_rng(seed)
        self.outputs = np.cumsum(draw.normal(size=(steps, WIDTH)), axis=0) + 3 * draw.normal(size=WIDTH)
        self.keep = draw.uniform(0.8, 1.1, steps)
        self.gain = draw.uniform(-0.4, -0.1, steps)
        self.memory = memory
        self.response = response * draw.uniform(-1, 1, steps)
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
        gram = self.outputs @ self.outputs.T / WIDTH
        return Dynamics(gram=(gram + gram.T) / 2, reach=np.stack([o[:, 0] for o in ones], 1), response=self.response)

    def run(self, compute: np.ndarray, begins: tuple[int, ...] = ()) -> tuple[np.ndarray, float]:
        """The closed loop with these masks, fitted by lstsq: weights, mean squared error of the final state."""
        weights = np.zeros((len(compute), ANCHORS))
        handed: list[np.ndarray] = []
        anchors: list[np.ndarray] = []
        for i, computed in enumerate(compute):
            past = np.array([*handed, *np.zeros((len(compute) - i, WIDTH))])
            if computed:
                error = self.walk(past)[i - 1] - self.states[i - 1] if i else 0
                handed.append(self.outputs[i] + self.response[i] * error)
                anchors = [handed[i], *([] if i in begins else anchors)][:ANCHORS]
            else:
                rest = self.states[i] - self.walk(past)[i]
                w, *_ = np.linalg.lstsq(self.gain[i] * np.stack(anchors, 1), rest, rcond=None)
                weights[i, : len(w)] = w
                handed.append(w @ np.stack(anchors))
        return weights, float(((self.walk(np.array(handed))[-1] - self.states[-1]) ** 2).mean())


masks = st.lists(st.booleans(), min_size=1, max_size=9).map(lambda rest: np.array([True, *rest]))


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 99), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.3]))
def test_a_simulated_run_is_the_run(compute: np.ndarray, seed: int, memory: float, response: float) -> None:
    loop = Loop(len(compute), seed, memory=memory, response=response)
    weights, error = loop.run(compute)
    simulated = simulate(loop.dynamics(), compute)
    assert simulated.error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert simulated.weights == pytest.approx(weights, rel=1e-3, abs=1e-4)
    assert final_error(loop.dynamics(), compute) == simulated.error


def test_the_simulation_sees_memory_and_response() -> None:
    """What a simulation that takes the sampler for a one-step one, or the network for deaf, would miss."""
    compute = evenly(10, 4)
    _, error = (loop := Loop(10, 0, memory=0.5, response=0.3)).run(compute)
    whole = loop.dynamics()
    deaf = Dynamics(gram=whole.gram, reach=whole.reach, response=np.zeros(10))
    one_step = Dynamics(gram=whole.gram, reach=Loop(10, 0).dynamics().reach, response=whole.response)
    assert final_error(whole, compute) == pytest.approx(error, rel=1e-4)
    assert final_error(deaf, compute) != pytest.approx(error, rel=0.01)
    assert final_error(one_step, compute) != pytest.approx(error, rel=0.01)


def test_a_denoiser_that_takes_over_has_no_anchors_yet() -> None:
    loop = Loop(8, 3)
    compute = np.array([letter == "■" for letter in "■■·■··■·"])
    weights, error = loop.run(compute, begins=(3,))
    simulated = simulate(loop.dynamics(), compute, begins=(3,))
    assert simulated.error == pytest.approx(error, rel=1e-6)
    assert simulated.weights == pytest.approx(weights, abs=1e-5)
    assert not simulated.weights[4:6, 1:].any()
    assert simulate(loop.dynamics(), compute).weights[4:6, 1].all()


@given(st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_nothing_is_missing_when_all_is_computed(steps: int, seed: int) -> None:
    simulated = simulate(Loop(steps, seed, response=0.3).dynamics(), np.ones(steps, bool))
    assert simulated.error == 0
    assert not simulated.weights.any()


def test_a_step_that_moves_nothing_reuses() -> None:
    still = dynamics(reach=np.zeros((6, 6)))
    compute = evenly(6, 2)
    assert simulate(still, compute).weights.tolist() == [(~c * np.eye(ANCHORS)[0]).tolist() for c in compute]


# Choosing.


def costs(loop: Dynamics, steps: int, computed: int) -> dict[bytes, float]:
    """Every mask there is."""
    found = {}
    for chosen in itertools.combinations(range(1, steps), computed - 1):
        compute = np.zeros(steps, bool)
        compute[[0, *chosen]] = True
        found[compute.tobytes()] = final_error(loop, compute)
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 8).flatmap(lambda t: st.tuples(st.just(t), st.integers(2, t - 1))), st.integers(0, 999))
def test_improving_ends_where_no_move_helps_and_never_worsens(size: tuple[int, int], seed: int) -> None:
    steps, computed = size
    loop = Loop(steps, seed, response=0.2).dynamics()
    cost = functools.partial(final_error, loop)
    every = costs(loop, steps, computed)
    better = improve(evenly(steps, computed), cost)
    assert better[0]
    assert better.sum() == computed
    assert min(every.values()) <= cost(better) <= cost(evenly(steps, computed))
    for step in np.flatnonzero(better)[1:]:
        assert all(cost(other) >= cost(better) for other in shifts(better, int(step)) if other[0])


def test_the_best_of_all_masks_is_mostly_found_and_stays_where_it_is() -> None:
    found = 0
    for seed in range(20):
        loop = Loop(8, seed).dynamics()
        every = costs(loop, 8, 3)
        best = np.frombuffer(min(every, key=every.__getitem__), bool)
        assert np.array_equal(improve(best, functools.partial(final_error, loop)), best)
        better = improve(evenly(8, 3), functools.partial(final_error, loop))
        found += bool(np.isclose(final_error(loop, better), min(every.values())))
    assert 10 <= found < 20  # by single moves from the even mask: not always


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


# From a profile to a schedule.


def of(loop: Loop, **changes: object) -> Profile:
    steps = len(loop.outputs)
    fields: dict[str, object] = {
        "steps": steps,
        "start": 0,
        "timesteps": np.linspace(999, 1, steps),
        "sigmas": None,
        "denoisers": {"transformer": measured(tables(loop.outputs[None]))},
        "dynamics": loop.dynamics(),
    }
    return profile(**fields | changes)


@pytest.mark.parametrize("computed", [1, 2, 5, 12])
def test_a_plan_is_the_improved_mask_with_the_simulated_weights(computed: int) -> None:
    loop = Loop(12, 1, response=0.2)
    schedule = plan(of(loop), computed)
    site = schedule.denoisers["transformer"].sites["model"]
    assert schedule.computed_steps == computed
    assert schedule.steps == 12
    assert np.array_equal(site.weights[0], simulate(loop.dynamics(), site.compute).weights)
    assert float(schedule.provenance["expected_state_mse"]) == pytest.approx(
        final_error(loop.dynamics(), site.compute), rel=0.01
    )
    assert final_error(loop.dynamics(), site.compute) <= final_error(loop.dynamics(), evenly(12, computed))


def test_a_plan_belongs_to_what_was_measured(tmp_path: Path) -> None:
    measured_ = of(Loop(12, 1))
    schedule = plan(measured_, 4)
    assert schedule.denoisers["transformer"].class_name == "Net"
    assert schedule.denoisers["transformer"].config_digest == DIGEST
    assert schedule.noise_scheduler == measured_.noise_scheduler
    assert schedule.guidance == measured_.guidance
    assert schedule.timesteps.tolist() == measured_.timesteps.tolist()  # type: ignore[union-attr]
    assert schedule.provenance["profile"] == measured_.digest()
    again = plan(Profile.load(measured_.save(tmp_path / "profile.safetensors")), 4)
    assert again.to_bytes() == schedule.to_bytes()
    assert CacheSchedule.load(schedule.save(tmp_path / "schedule.safetensors")) == schedule


def test_a_loop_that_starts_late_is_planned_from_there() -> None:
    loop = Loop(8, 1)
    late = plan(of(loop, start=3), 3)
    early = plan(of(loop), 3)
    there, here = late.denoisers["transformer"].sites["model"], early.denoisers["transformer"].sites["model"]
    assert late.steps == 11
    assert late.timesteps is None
    assert there.compute[:3].all()
    assert np.array_equal(there.compute[3:], here.compute)
    assert np.array_equal(there.weights[:, 3:], here.weights)


def test_what_cannot_be_planned_is_refused() -> None:
    loop = Loop(8, 1)
    with pytest.raises(BadOption, match="one without dynamics \\(none were measured\\)"):
        plan(of(loop, dynamics=None), 3)
    with pytest.raises(BadOption, match="one without dynamics \\(it clips\\)"):
        plan(of(loop, dynamics=None, provenance={"no_dynamics": "it clips"}), 3)
    for computed in (0, 9, 2.5):
        with pytest.raises(BadOption, match=r"computed_steps=.* Allowed: 1 to 8"):
            plan(of(loop), computed)  # type: ignore[arg-type]
    block = DenoiserProfile(class_name="Net", sites={"block:blocks.0": tables(loop.outputs[None])})
    with pytest.raises(BadOption, match=r"one of block:blocks\.0 in 'unet'"):
        plan(of(loop, denoisers={"unet": block}), 3)
