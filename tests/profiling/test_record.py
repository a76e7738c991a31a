"""Recording: the run stays as it was, and what is written down is what happened."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from calibrated import BATCH, CALLS, calibration, calls, final_states, recorded
from pipelines import ALL, TINY, fresh, run, shared, watch

import diffcache
from diffcache.errors import AlreadyAccelerated, BadOption, UnsupportedModel
from diffcache.patch import Layers
from diffcache.profiling import Calibration
from diffcache.profiling.recording import Trajectory, with_copied_generators
from diffcache.profiling.recording.record import _demand_one_grid, record, record_all

SOME = ("flux", "flux_img2img", "sd3_heun", "wan22", "dit", "sd15", "ddpm")


def call(name: str, seed: int = 0) -> dict[str, Any]:
    return TINY[name].call(shared(name)) | {"generator": torch.Generator().manual_seed(seed)}


def traces(pipe: Any) -> set[str]:
    """What a recording puts into the ``__dict__`` of the pipeline and its parts."""
    owners = {"pipe": pipe} | {name: part for name, part in pipe.components.items() if hasattr(part, "__dict__")}
    return {
        f"{name}.{key}" for name, owner in owners.items() for key, v in vars(owner).items() if isinstance(v, Layers)
    }


def last(trajectory: Trajectory) -> torch.Tensor:
    result = trajectory.steps[-1].result
    assert result is not None
    return result


@pytest.mark.parametrize("name", SOME)
def test_a_recorded_run_is_the_run_and_leaves_no_trace(name: str) -> None:
    pipe = fresh(name)
    (plain,) = final_states(pipe, [call(name)])
    recorded = record(pipe, call(name))
    assert not traces(pipe)
    assert torch.equal(last(recorded), plain)
    assert not torch.equal(last(recorded), final_states(pipe, [call(name, seed=1)])[0])  # the comparison can fail


@pytest.mark.parametrize("name", TINY)
def test_every_step_of_every_loop_is_written_down(name: str) -> None:
    tiny = TINY[name]
    trajectories = calibration(name).trajectories
    assert len(trajectories) == CALLS
    for trajectory in trajectories:
        steps = trajectory.steps
        assert len(steps) == tiny.steps == len(trajectory.timesteps) - trajectory.start
        assert [float(s.timestep) for s in steps] == trajectory.timesteps[trajectory.start :].tolist()
        assert {len(s.calls) for s in steps} == {2 if tiny.guidance == "separate" else 1}
        assert all(c.seconds > 0 for s in steps for c in s.calls)
        called = {id(c.module) for s in steps for c in s.calls}
        assert called == {id(getattr(calibration(name).pipe, d)) for d in tiny.denoisers}
        if name != "flux_inpaint":  # which paints over the state between two steps
            assert all(b.state is a.result for a, b in itertools.pairwise(steps))
    assert not torch.equal(last(trajectories[0]), last(trajectories[1]))


@pytest.mark.parametrize("name", ["flux", "chroma", "z_image"])
def test_outputs_and_their_order_are_those_that_a_hook_sees(name: str) -> None:
    pipe = shared(name)
    with watch(pipe, TINY[name].denoisers) as seen:
        trajectory = record(pipe, call(name))
    written = [c for s in trajectory.steps for c in s.calls]
    assert len(written) == len(seen)
    for ours, theirs in zip(written, seen, strict=True):
        assert torch.equal(torch.cat([o.flatten() for o in ours.outputs]), theirs.output.flatten())


@pytest.mark.fast
def test_equal_tensors_are_held_once() -> None:
    steps = record(shared("flux"), call("flux")).steps  # no guidance: the output goes to the noise scheduler as it is
    assert all(s.model_output is s.calls[0].output for s in steps)
    guided = record(shared("chroma"), call("chroma")).steps
    assert not any(s.model_output is c.output for s in guided for c in s.calls)


@pytest.mark.fast
def test_calls_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(readings)))  # between two readings lies a second
    trajectory = record(shared("sd15"), call("sd15"))
    assert {c.seconds for s in trajectory.steps for c in s.calls} == {1.0}


@pytest.mark.fast
def test_recording_leaves_generators_where_they_were() -> None:
    pipe = shared("flux")
    one = torch.Generator().manual_seed(5)
    torch.randn(3, generator=one)  # found in mid-stream, left there
    both = [TINY["flux"].call(pipe) | {"generator": one} for _ in range(2)]
    found = one.get_state()
    trajectories = record_all(pipe, both)
    assert torch.equal(one.get_state(), found)
    again = final_states(pipe, both)
    assert torch.equal(again[0], last(trajectories[0]))
    assert torch.equal(again[1], last(trajectories[1]))
    assert not torch.equal(again[0], again[1])  # one generator, drawn from by one call after the other
    assert not torch.equal(one.get_state(), found)  # which a run does move


@pytest.mark.fast
def test_generators_are_put_back_when_a_call_fails() -> None:
    pipe = shared("flux")
    good = calls("flux", pipe)[0]
    found = [g.get_state() for g in good["generator"]]
    with pytest.raises(TypeError):
        record_all(pipe, [good, {"nonsense": 1}])
    assert all(torch.equal(g.get_state(), s) for g, s in zip(good["generator"], found, strict=True))


@pytest.mark.fast
def test_a_frozen_generator_draws_what_the_original_would_have_drawn() -> None:
    one = torch.Generator().manual_seed(0)
    torch.randn(5, generator=one)
    copies = [with_copied_generators(one), *with_copied_generators([one]), *with_copied_generators((one,))]
    drawn = torch.randn(4, generator=one)
    for other in copies:
        assert torch.equal(torch.randn(4, generator=other), drawn)
    assert not torch.equal(torch.randn(4, generator=copies[0]), drawn)
    assert with_copied_generators(None) is None
    assert with_copied_generators(0.5) == 0.5


@pytest.mark.fast
def test_done_is_called_after_each_call() -> None:
    ticks: list[int] = []
    pipe = shared("flux")
    record_all(pipe, calls("flux", pipe), lambda: ticks.append(1))
    assert len(ticks) == CALLS
    assert calibration("flux").trajectories[0].steps[0].state.shape[0] == BATCH  # type: ignore[union-attr]


@pytest.mark.fast
def test_an_accelerated_pipeline_is_refused() -> None:
    pipe = fresh("flux")
    diffcache.accelerate(pipe, "uniform:every=2")
    with pytest.raises(AlreadyAccelerated, match="record predictions as outputs of the full run"):
        record(pipe, call("flux"))
    diffcache.restore(pipe)
    assert len(record(pipe, call("flux")).steps) == TINY["flux"].steps


@pytest.mark.fast
def test_a_loop_that_is_cut_short_is_recorded_as_far_as_it_goes() -> None:
    pipe = fresh("flux")

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return {}

    cut, whole = record(pipe, call("flux") | {"callback_on_step_end": stop}), record(pipe, call("flux"))
    assert not traces(pipe)
    assert (cut.start, cut.end, len(cut.timesteps)) == (0, 3, 6)
    assert torch.equal(last(cut), whole.steps[2].result)  # type: ignore[arg-type]
    assert not torch.equal(last(cut), last(whole))


EARLY = {  # pipelines with a loop that ends before the last step of the noise scheduler: start, end, steps of the grid
    "sdxl_ends_early": (0, 4, 6),
    "stable_cascade_prior": (0, 6, 7),
    "stable_cascade_decoder": (0, 6, 7),
    "wuerstchen_prior": (0, 6, 7),
    "sana_sprint": (0, 6, 7),
    "sana_sprint_img2img": (2, 6, 7),
}


@pytest.mark.parametrize("name", EARLY)
def test_a_loop_that_ends_early_is_recorded_and_accelerated(name: str) -> None:
    found = recorded(name)
    (trajectory,) = found.trajectories
    start, end, planned = EARLY[name]
    assert (trajectory.start, trajectory.end, len(trajectory.timesteps)) == (start, end, planned)
    schedule = found.schedule(3)
    assert schedule.called.tolist() == [start <= step < end for step in range(planned)]
    assert f"3 of {end - start} steps computed; the loop runs steps {start} to {end - 1} of {planned}" in str(schedule)
    rows = rows_of(name, schedule)
    assert sum(row.computed for row in rows) == 3
    assert sum(row.predicted for row in rows) == end - start - 3
    profile = found.profile()
    assert (profile.start, profile.steps, profile.after) == (start, end - start, planned - end)
    made = diffcache.plan(profile, "uniform", 3)
    assert made.called.tolist() == schedule.called.tolist()
    assert sum(row.predicted for row in rows_of(name, made)) == end - start - 3


def rows_of(name: str, schedule: diffcache.CacheSchedule) -> list[Any]:
    """Return the rows of the report of a run with ``schedule``. No prediction failed in it."""
    pipe = fresh(name)
    with torch.random.fork_rng(devices=[]), diffcache.accelerated(pipe, schedule):
        torch.manual_seed(0)
        run(pipe, ALL[name].call(pipe))
        rows = diffcache.report(pipe).rows
    assert not any(row.failed_open for row in rows)
    return rows


SEVERAL = "the pipeline calls scheduler.step several times in one step of its loop."
PARTS = {  # pipelines that do not call scheduler.step once in each step: calls of the network in a step, why
    "cosmos": (2, SEVERAL),
    "cosmos_video_to_world": (2, SEVERAL),
    "sd15_panorama": (2, SEVERAL),
    "sky_reels_forcing": (2, "the pipeline steps copies of its noise scheduler."),
}


@pytest.mark.parametrize("name", PARTS)
def test_steps_in_several_parts_are_recorded_as_one_and_fitted_to_outputs(name: str) -> None:
    found = recorded(name)
    (trajectory,) = found.trajectories
    calls_each, why = PARTS[name]
    assert [len(step.calls) for step in trajectory.steps] == [calls_each] * 6
    assert (found.target, found.why_output) == ("output", why)
    with pytest.warns(diffcache.WeakerFit, match=why):
        schedule = found.schedule(3)
    assert schedule.provenance["samples"] == "1"
    rows = rows_of(name, schedule)
    assert [row.computed for row in rows] == [3] * calls_each
    assert [row.predicted for row in rows] == [3] * calls_each


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "any_flow_far": "was not seen: it runs in no pipe.progress_bar",
        "helios_pyramid": "3 stages, each with other timesteps",
        "sky_reels_forcing_in_turn": "takes 10 steps, and a schedule holds only the 6",
    }.items(),
)
def test_a_loop_that_no_schedule_can_describe_is_refused_with_the_next_step(name: str, why: str) -> None:
    pipe = fresh(name)
    with pytest.raises(UnsupportedModel, match=why) as refused:
        record(pipe, ALL[name].call(pipe))
    assert "diffcache.trajectory" in str(refused.value) or 'diffcache.accelerate(pipe, "auto")' in str(refused.value)
    assert not traces(pipe)


@pytest.mark.fast
def test_a_loop_that_leaves_steps_out_in_between_is_refused() -> None:
    trajectory = record(shared("flux"), call("flux"))
    trajectory.steps = trajectory.steps[::2]
    with pytest.raises(UnsupportedModel, match="3 steps of the 6 that the noise scheduler planned, and leaves some"):
        _demand_one_grid("Some", trajectory, 1)
    trajectory.steps = record(shared("flux"), call("flux")).steps[:3]
    _demand_one_grid("Some", trajectory, 1)


@pytest.mark.fast
def test_a_run_that_comes_to_nothing_is_refused() -> None:
    pipe = fresh("flux")
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(BadOption, match="NaN or Inf"):
        record(pipe, call("flux"))


@pytest.mark.fast
def test_a_failing_call_leaves_no_trace() -> None:
    pipe = fresh("sd3")
    during: list[set[str]] = []

    def fail(*_: Any) -> dict[str, Any]:
        during.append(traces(pipe))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(pipe, call("sd3") | {"callback_on_step_end": fail})
    assert during[0] >= {"transformer.forward", "scheduler.step", "pipe.progress_bar"}  # traces are found if there are
    assert not traces(pipe)


@pytest.mark.fast
def test_no_calls_are_refused() -> None:
    with pytest.raises(BadOption, match="at least one dictionary"):
        Calibration.record(shared("flux"), [])
