"""A schedule's own noise levels: a run over them is the run of whoever sets them by hand, and leaves no trace.

By hand means: the untouched pipeline, whose noise scheduler has other tensors put in by a wrapper of ``set_timesteps``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import STEPS, TINY
from probes import bound, hold
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerated, report
from diffcache.errors import ScheduleMismatch
from diffcache.executor import noise_levels
from diffcache.schedulers.timestep_adjustment import moved

REACH = np.array([1, 0.5, 1, 0.7, 1, 1])  # how far each of the six steps goes
FULL = "#" * STEPS
Times = Callable[[Any, np.ndarray], np.ndarray]


def flow(_scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    return sigmas * 1000


def edm(_scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    return np.log(sigmas) / 4


def table(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Where the level lies among those of the thousand training steps."""
    alphas = scheduler.alphas_cumprod.double().numpy()
    return np.interp(np.log(sigmas), np.log((1 - alphas) / alphas) / 2, np.arange(1000))


FOLLOW: dict[tuple[str, str], Times] = {
    ("flux", ""): flow,
    ("flux", "dpmpp_2m"): flow,
    ("flux", "unipc"): flow,
    ("sd3", ""): flow,
    ("wan", ""): flow,
    ("wan", "euler"): flow,
    ("sdxl", "euler"): table,
    ("sdxl", "euler_ancestral"): table,
    ("sdxl", "dpmpp_2m"): table,
    ("sd15", "unipc"): table,
    ("dit", "dpmpp_2m"): table,
    ("stable_audio", ""): edm,
}
followed = pytest.mark.parametrize(("name", "scheduler"), FOLLOW, ids=lambda value: value or "own")


def assert_same(out: Tensor, other: Tensor, times: Times = flow, scheduler: Any = None) -> None:
    """Bit for bit; up to rounding where a timestep comes out of a table and keeps its fraction."""
    rounded = times is not table or not scheduler.timesteps.is_floating_point()
    torch.testing.assert_close(out, other, rtol=0, atol=0 if rounded else 1e-4)


def fresh(name: str, scheduler: str = "") -> tuple[Any, dict[str, Any]]:
    pipe = pipelines.fresh(name)
    if scheduler:
        pipelines.with_scheduler(pipe, scheduler)
    return pipe, TINY[name].call(pipe)


@functools.cache
def plain(name: str, scheduler: str = "") -> tuple[Tensor, np.ndarray, np.ndarray]:
    """An untouched run: what comes out, its noise levels and its timesteps."""
    pipe, call = fresh(name, scheduler)
    out = pipelines.run(pipe, call)
    levels = getattr(pipe.scheduler, "sigmas", torch.linspace(1, 0, STEPS + 1))
    return out, levels.double().numpy(), pipe.scheduler.timesteps.double().numpy()


def schedule_for(pipe: Any, sigmas: np.ndarray, mask: str = FULL, **more: Any) -> CacheSchedule:
    return dataclasses.replace(bound(pipe, hold(mask)), sigmas=sigmas, **more)


@contextmanager
def by_hand(scheduler: Any, sigmas: np.ndarray, times: Times) -> Iterator[None]:
    inner = scheduler.set_timesteps

    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        found = times(scheduler, sigmas[:-1])
        if not scheduler.timesteps.is_floating_point():
            found = (found + 1e-3).astype(int) if times is flow else found.round()  # as these schedulers do
        scheduler.timesteps = torch.tensor(found, dtype=scheduler.timesteps.dtype)
        scheduler.sigmas = torch.tensor(sigmas, dtype=scheduler.sigmas.dtype)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


# --- the run ---------------------------------------------------------------------------------------------------------


@followed
def test_a_full_run_over_moved_levels_is_the_run_of_whoever_sets_them(name: str, scheduler: str) -> None:
    untouched, nominal, _ = plain(name, scheduler)
    pipe, call = fresh(name, scheduler)
    sigmas = moved(nominal, REACH)
    with accelerated(pipe, schedule_for(pipe, sigmas)):
        out = pipelines.run(pipe, call)
    with by_hand(pipe.scheduler, sigmas, FOLLOW[name, scheduler]):
        assert_same(out, pipelines.run(pipe, call), FOLLOW[name, scheduler], pipe.scheduler)
    assert float((out - untouched).abs().max()) > 1e-2


@pytest.mark.parametrize(("name", "scheduler"), [("flux", ""), ("wan", ""), ("sdxl", "dpmpp_2m")])
def test_predictions_go_on_as_they_would_on_a_grid_of_these_levels(name: str, scheduler: str) -> None:
    pipe, call = fresh(name, scheduler)
    sigmas = moved(plain(name, scheduler)[1], REACH)
    mask = "#.##.#"
    with accelerated(pipe, schedule_for(pipe, sigmas, mask)):
        out = pipelines.run(pipe, call)
        assert all((row.computed, row.predicted) == (4, 2) and not row.failed_open for row in report(pipe).rows)
    without = dataclasses.replace(schedule_for(pipe, sigmas, mask), sigmas=None)
    with by_hand(pipe.scheduler, sigmas, FOLLOW[name, scheduler]), accelerated(pipe, without):
        assert torch.equal(out, pipelines.run(pipe, call))


def test_levels_that_are_the_grids_own_change_nothing() -> None:
    untouched, nominal, _ = plain("wan")
    pipe, call = fresh("wan")
    with accelerated(pipe, schedule_for(pipe, nominal)):
        assert torch.equal(pipelines.run(pipe, call), untouched)


def test_flux_agrees_with_its_own_argument() -> None:
    """``sigmas=`` takes levels that are not shifted yet: FluxPipeline shifts them by exp(mu), which takes 1/6 to
    nominal[-2]."""
    _, nominal, _ = plain("flux")
    pipe, call = fresh("flux")
    sigmas = moved(nominal, REACH)
    shift = 5 * nominal[-2] / (1 - nominal[-2])
    with accelerated(pipe, schedule_for(pipe, sigmas)):
        out = pipelines.run(pipe, call)
    own = pipelines.run(pipe, call, sigmas=(sigmas / (sigmas + shift * (1 - sigmas)))[:-1].tolist())
    np.testing.assert_allclose(pipe.scheduler.sigmas.numpy(), sigmas, atol=1e-6)
    torch.testing.assert_close(out, own, rtol=0, atol=2e-5)


def test_sdxl_agrees_with_its_own_argument() -> None:
    pipe, call = fresh("sdxl", "euler")
    sigmas = moved(plain("sdxl", "euler")[1], REACH)
    with accelerated(pipe, schedule_for(pipe, sigmas)):
        out = pipelines.run(pipe, call)
    assert_same(out, pipelines.run(pipe, call, sigmas=sigmas.tolist()), table, pipe.scheduler)


# --- before and after ------------------------------------------------------------------------------------------------


def test_the_grid_it_was_planned_on_is_compared_before_it_is_moved() -> None:
    _, nominal, timesteps = plain("flux")
    pipe, call = fresh("flux")
    schedule = schedule_for(pipe, moved(nominal, REACH), timesteps=timesteps)
    with accelerated(pipe, schedule):
        first = pipelines.run(pipe, call)
        assert torch.equal(first, pipelines.run(pipe, call))
        with pytest.raises(ScheduleMismatch, match="fitted on other timesteps"):
            pipelines.run(pipe, call, sigmas=np.linspace(1, 1 / 6, 6) ** 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_afterwards_the_noise_scheduler_is_as_it_was(mode: Any) -> None:
    untouched, nominal, timesteps = plain("flux")
    pipe, call = fresh("flux")
    with accelerated(pipe, schedule_for(pipe, moved(nominal, REACH))):
        with mode():
            pipelines.run(pipe, call)
        assert (pipe.scheduler.sigmas.double().numpy() == nominal).all()
        assert (pipe.scheduler.timesteps.double().numpy() == timesteps).all()
        assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipelines.run(pipe, call), untouched)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_after_a_broken_run_too(mode: Any) -> None:
    untouched, nominal, timesteps = plain("wan")
    pipe, call = fresh("wan")
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 7:  # in the fourth step
            raise KeyboardInterrupt

    with accelerated(pipe, schedule_for(pipe, moved(nominal, REACH))):
        handle = pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt), mode():
            pipelines.run(pipe, call)
        handle.remove()
        assert (pipe.scheduler.sigmas.double().numpy() == nominal).all()
        assert (pipe.scheduler.timesteps.double().numpy() == timesteps).all()
        assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipelines.run(pipe, call), untouched)


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ("flux_img2img", "", "the loop starts at step 2"),
    ("sd3_heun", "", "it visits levels more than once"),
    ("sdxl", "heun", "it visits levels more than once"),
    ("dit", "", "DDIMScheduler in DiTPipeline does not support: it does not have one noise level"),
    ("sd15", "ddpm", "it does not have one noise level"),
    ("sd15", "pndm", "it does not have one noise level"),
    ("ltx2", "", "steps with copies of its noise scheduler"),
    ("mochi", "", "this run starts at the level 0, the schedule's at 1"),
]


@pytest.mark.parametrize(("name", "scheduler", "words"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_cannot_follow_is_refused_before_the_first_step(name: str, scheduler: str, words: str) -> None:
    untouched, _, timesteps = plain(name, scheduler)
    pipe, call = fresh(name, scheduler)
    schedule = schedule_for(pipe, np.linspace(1, 0, len(timesteps) + 1), "#" * len(timesteps))
    with accelerated(pipe, schedule), pipelines.watch(pipe, TINY[name].denoisers) as calls:
        with pytest.raises(ScheduleMismatch, match=words):
            pipelines.run(pipe, call)
        assert not calls
        assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipelines.run(pipe, call), untouched)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("flux", lambda s: s * 0.9, r"starts at the level 1, the schedule's at 0\.9"),
        ("flux", lambda s: s + (1 - s) * 0.01, r"ends at the level 0, the schedule's at 0\.01"),
        (
            "wan",
            lambda s: s[[0, 1, 1, 3, 4, 5, 6]],
            "divides by the distance between two levels, and the schedule's repeat",
        ),
        ("sana", lambda s: [s[0], s[0] - 1e-5, *s[2:]], r"the timestep 999 of its first step comes again"),
    ],
)
def test_levels_it_could_not_run_over_are_refused(name: str, change: Any, words: str) -> None:
    pipe, call = fresh(name)
    sigmas = np.asarray(change(plain(name)[1]))
    with accelerated(pipe, schedule_for(pipe, sigmas)), pipelines.watch(pipe, TINY[name].denoisers) as calls:
        with pytest.raises(ScheduleMismatch, match=words):
            pipelines.run(pipe, call)
        assert not calls


def test_levels_may_repeat_where_nothing_divides_by_their_distance() -> None:
    pipe, call = fresh("flux")
    with accelerated(pipe, schedule_for(pipe, plain("flux")[1][[0, 1, 1, 3, 4, 5, 6]])):
        assert pipelines.run(pipe, call).isfinite().all()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.seen.append(float(timestep))
        return (torch.sin(hidden_states) * float(timestep) / 1000,)


class Loop(DiffusionPipeline):
    """``taken``: what its loop makes of the timesteps before it opens the bar. ``times``: loops per set_timesteps."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)
        self.taken: Callable[[Tensor], Any] = lambda timesteps: timesteps
        self.times = 1

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.scheduler.set_timesteps(STEPS)
        timesteps = self.taken(self.scheduler.timesteps)
        x = torch.linspace(-1, 1, 8)[None]
        for _ in range(self.times):
            self.scheduler.set_begin_index(0)
            self.scheduler._step_index = None
            with self.progress_bar(total=STEPS):
                for t in timesteps:
                    x = self.scheduler.step(self.transformer(x, t)[0], t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return x


def loop(scheduler: Any) -> Loop:
    return Loop(Net(), scheduler)


@pytest.mark.parametrize(
    "taken",
    [Tensor.clone, Tensor.tolist, lambda t: t.bfloat16(), lambda t: t[:, None].expand(-1, 2).contiguous()[:, :1]],
)
def test_a_copy_of_the_timesteps_is_found_out_at_the_first_moved_step(taken: Callable[[Tensor], Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    nominal = scheduler.sigmas.double().numpy()
    pipe = loop(scheduler)
    pipe.taken = taken
    with accelerated(pipe, schedule_for(pipe, moved(nominal, REACH))):
        with pytest.raises(ScheduleMismatch, match=r"the schedule moved step 2 to timestep .* iterates over a copy"):
            pipe()
        assert len(pipe.transformer.seen) == 3
    assert len(pipe()) == 1


def test_a_loop_may_end_outside_of_the_mode_that_its_tensors_are_of() -> None:
    pipe = loop(FlowMatchEulerDiscreteScheduler())
    pipe()
    nominal = pipe.scheduler.sigmas.double().numpy()
    with accelerated(pipe, schedule_for(pipe, moved(nominal, REACH))):
        with torch.inference_mode():
            pipe.scheduler.set_timesteps(STEPS)
            bar = pipe.progress_bar(total=STEPS)
            bar.__enter__()
        assert pipe.scheduler.sigmas[2] > nominal[2]
        bar.__exit__(None, None, None)
        assert (pipe.scheduler.sigmas.double().numpy() == nominal).all()


@pytest.mark.parametrize("taken", [lambda t: t, lambda t: t[0:], list, lambda t: t.to("cpu").float()])
def test_views_of_the_timesteps_are_no_copies(taken: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = moved(scheduler.sigmas.double().numpy(), REACH)
    pipe = loop(scheduler)
    pipe.taken, pipe.times = taken, 2
    schedule = schedule_for(pipe, sigmas, timesteps=scheduler.timesteps.double().numpy())
    monkeypatch.setattr(noise_levels, "float", lambda _: pytest.fail("a device was read"), raising=False)
    with accelerated(pipe, schedule):
        pipe()
    np.testing.assert_allclose(pipe.transformer.seen, [*sigmas[:-1] * 1000] * 2, rtol=1e-6)


def test_a_noise_scheduler_that_keeps_more_by_the_step_is_refused() -> None:
    pipe = loop(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    pipe()
    sigmas = pipe.scheduler.sigmas.double().numpy()
    with accelerated(pipe, schedule_for(pipe, sigmas)):
        pipe()
        pipe.scheduler.gains = torch.ones(STEPS)
        with pytest.raises(ScheduleMismatch, match="it also keeps gains for every step"):
            pipe()


def test_a_noise_scheduler_that_makes_its_timesteps_otherwise_is_refused() -> None:
    class Inverted(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = 1 - self.timesteps / 1000

    pipe = loop(Inverted())
    pipe()
    with accelerated(pipe, schedule_for(pipe, pipe.scheduler.sigmas.double().numpy())):
        with pytest.raises(ScheduleMismatch, match="its rule for timesteps of noise levels is not known"):
            pipe()
