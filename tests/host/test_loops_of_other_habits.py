"""Which step a forward serves in loops of one's own, each with one odd habit."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from probes import bound, hold, ours
from torch import Tensor, nn

from diffcache import accelerate, accelerated, report, restore
from diffcache import host as hosting
from diffcache.errors import ScheduleMismatch, UnsupportedModel
from diffcache.executor import FailedOpen
from diffcache.host.kinds import pipeline

pytestmark = pytest.mark.fast


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (torch.sin(hidden_states * 3) + timestep / 1000,)


class ToyPipeline(DiffusionPipeline):
    """A loop of one's own, with one odd habit at a time.

    views  the denoiser is given the noise scheduler's own timesteps, not numbers made of them
    """

    views = True

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def progress_bar(self, iterable: Any = None, total: int | None = None, desc: str = "", leave: bool = True) -> Any:
        return super().progress_bar(iterable, total)  # some pipelines name their bars

    @torch.no_grad()
    def __call__(self, habit: str, steps: int = 6) -> Tensor:
        x = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
        self.scheduler.set_timesteps(steps)
        if habit == "two bars, one inside the other":
            for _ in self.progress_bar(range(2), desc="pictures"):
                self.scheduler.set_timesteps(steps)
                for t in self.progress_bar(self.scheduler.timesteps, leave=False, desc="steps"):
                    x = self.one(x, t)
        elif habit == "one bar, several passes":
            with self.progress_bar(total=2 * steps) as bar:
                for _ in range(2):
                    self.scheduler._step_index = None
                    for t in self.scheduler.timesteps:
                        x = self.one(x, t)
                        bar.update()
        elif habit == "the loop runs over numbers":
            for i in self.progress_bar(range(steps)):
                x = self.one(x, self.scheduler.timesteps[i])
        elif habit == "a bar over something else":
            for _ in self.progress_bar(range(3)):
                x = self.transformer(x, torch.tensor(500.0))[0]
        elif habit == "the last timestep is left out":
            for t in self.progress_bar(self.scheduler.timesteps[:-1]):
                x = self.one(x, t)
        elif habit == "back to the start from step 2":
            with self.progress_bar(total=steps):
                for i in (0, 1, 2, 0, 1, 2):
                    self.scheduler._step_index = i
                    x = self.one(x, self.scheduler.timesteps[i])
        elif habit == "a step in two parts":
            for t in self.progress_bar(self.scheduler.timesteps):
                kept = copy.deepcopy(vars(self.scheduler))
                left = self.one(x[..., :2], t)
                vars(self.scheduler).update(kept)
                x = torch.cat([left, self.one(x[..., 2:] * 1.5, t)], dim=-1)
        elif habit == "noise schedulers of its own":
            own = copy.deepcopy(self.scheduler)
            with self.progress_bar(total=steps) as bar:
                for t in own.timesteps:
                    x = own.step(self.transformer(x, t)[0], t, x)[0]
                    bar.update()
        elif habit == "an inversion":
            own = copy.deepcopy(self.scheduler)
            with self.progress_bar(total=steps) as bar:
                for t in own.timesteps.flip(0):
                    x = x + self.transformer(x, t)[0] / steps
                    bar.update()
        elif habit == "stages within the loop":
            with self.progress_bar(total=steps) as bar:
                for n in (steps // 2, steps - steps // 2):
                    self.scheduler.set_timesteps(n)
                    for t in self.scheduler.timesteps:
                        x = self.one(x, t)
                        bar.update()
        elif habit == "the noise scheduler steps twice":
            for t in self.progress_bar(self.scheduler.timesteps):
                y = copy.deepcopy(self.scheduler).step(self.transformer(x, t)[0], t, x)[0]
                x = self.one(x, t, called=False) * 0.5 + y * 0.5
        self.maybe_free_model_hooks()
        return x

    def one(self, x: Tensor, t: Tensor, *, called: bool = True) -> Tensor:
        output = self.transformer(x, t if self.views else t * 1)[0] if called else x
        return self.scheduler.step(output, t, x)[0]


def toy() -> Any:
    pipe = ToyPipeline(Toy(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("habit", "computed"),
    [
        ("two bars, one inside the other", 6),
        ("the loop runs over numbers", 3),
        ("the last timestep is left out", 3),
        ("the noise scheduler steps twice", 3),
        ("a step in two parts", 6),
        ("noise schedulers of its own", 3),
        ("stages within the loop", 4),
    ],
)
def test_loops_of_other_habits_are_followed(habit: str, computed: int) -> None:
    pipe = toy()
    plain = pipe(habit)
    with accelerated(pipe, "full"):
        assert torch.equal(pipe(habit), plain)
    pipe.transformer.calls = 0
    accelerate(pipe, "uniform:every=2")
    pipe(habit)
    assert pipe.transformer.calls == computed
    assert not any(row.failed_open for row in report(pipe).rows)
    restore(pipe)
    assert ours(pipe) == []


def test_an_inversion_is_reported_as_not_a_sampling_loop() -> None:
    """Its bar moves and the pipeline's noise scheduler does not, as in other loops that are followed; it begins where
    they end."""
    pipe = toy()
    plain = pipe("an inversion")
    with accelerated(pipe, "uniform:every=2"):
        with pytest.warns(FailedOpen, match="its sampling loop was not seen"):
            assert torch.equal(pipe("an inversion"), plain)


def test_each_part_of_a_step_is_predicted_from_its_own() -> None:
    """Both parts have the same shape: only their order distinguishes them."""
    pipe = toy()
    kept: list[Tensor] = []

    def reused(self: Toy, x: Tensor, t: Tensor) -> tuple[Tensor]:
        self.calls += 1
        step, part = divmod(self.calls - 1, 2)
        value = torch.sin(x * 3) + t / 1000 if step % 2 == 0 else kept[part]
        kept[part:] = [value, *kept[part + 1 :]]
        return (value,)

    with accelerated(pipe, "uniform:every=2"):
        fast = pipe("a step in two parts")
    pipe.transformer.calls, pipe.transformer.forward = 0, MethodType(reused, pipe.transformer)
    assert torch.equal(pipe("a step in two parts"), fast)


def test_parts_of_a_step_that_cannot_be_distinguished_are_refused_before_any_prediction() -> None:
    pipe = toy()
    pipe.views = False
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(UnsupportedModel, match="takes step 0 in several parts"):
            pipe("a step in two parts")
        assert report(pipe).bytes_held == 0
    assert ours(pipe) == []


def test_a_bar_over_something_else_is_not_a_sampling_loop_even_for_a_schedule_of_other_length() -> None:
    pipe = toy()
    plain = pipe("a bar over something else")
    with accelerated(pipe, bound(pipe, hold("#.#."))):
        with pytest.warns(FailedOpen, match="ToyPipeline was called and its sampling loop was not seen"):
            assert torch.equal(pipe("a bar over something else"), plain)
        assert report(pipe).runs == 0
        with pytest.raises(ScheduleMismatch):
            pipe("the loop runs over numbers")


def test_a_loop_that_goes_round_again_never_uses_what_the_first_pass_kept() -> None:
    pipe = toy()
    schedule = bound(pipe, hold("#.#..#"))
    with accelerated(pipe, schedule):
        pipe("one bar, several passes")
        assert report(pipe).bytes_held == 0
    assert pipe.transformer.calls == 3 + 3
    pipe.transformer.calls, pipe.views = 0, False
    with accelerated(pipe, schedule):
        with pytest.warns(FailedOpen, match="step beyond the schedule|an anchor is missing"):
            pipe("one bar, several passes")
        assert report(pipe).bytes_held == 0
    # Pass 2: its first forward is beyond the schedule, step 1 has lost its anchor; steps 2 and 5 are computed.
    assert pipe.transformer.calls == 3 + 4


def test_a_loop_that_goes_back_does_not_use_what_it_kept_before() -> None:
    pipe = toy()
    with accelerated(pipe, bound(pipe, hold("#....#"))):
        pipe("back to the start from step 2")
    assert pipe.transformer.calls == 2
    pipe.transformer.calls, pipe.views = 0, False
    with accelerated(pipe, bound(pipe, hold("#....#"))):
        with pytest.warns(FailedOpen, match="2 predictions were computed in full instead: an anchor is missing"):
            pipe("back to the start from step 2")
    # Where the loop went is known when the noise scheduler has stepped there: the fourth forward was taken for step 3.
    assert pipe.transformer.calls == 1 + 2


def test_going_back_is_reported_and_taking_a_step_twice_is_not() -> None:
    timesteps, told = torch.arange(6.0), []
    run = hosting.LoopRun(None, timesteps, 0, 0, went_back=lambda run: told.append(run.index))
    for i in (0, 1, 2, 2, 3):
        run.step_done(timesteps[i])
        assert run.index == i + 1
    assert told == []
    run.step_done(timesteps[1])
    assert (run.index, told) == (2, [4])
    run.step_done(timesteps[4])
    run.step_done("no tensor")
    assert (run.index, told) == (6, [4])


def test_the_start_of_a_loop_is_read_off_the_timesteps_it_iterates_over() -> None:
    timesteps = torch.arange(10.0)
    assert pipeline._start_of(timesteps, timesteps) == 0
    assert pipeline._start_of(timesteps[4:], timesteps) == 4
    assert pipeline._start_of(timesteps[:-1], timesteps) == 0
    assert pipeline._start_of(timesteps.flip(0), timesteps) is None  # an inversion, not the noise scheduler's loop
    assert pipeline._start_of(range(10), timesteps) == 0
    assert pipeline._start_of(range(9), timesteps) is None
    assert pipeline._start_of(iter([1]), timesteps) is None


def test_a_step_is_recognised_only_by_the_address_of_its_timestep() -> None:
    timesteps = torch.tensor([9.0, 5.0, 5.0, 1.0])
    views = list(timesteps)
    assert [hosting.loop_run.position(view, timesteps) for view in views] == [0, 1, 2, 3]
    assert hosting.loop_run.position(views[2].expand(3), timesteps) == 2
    assert hosting.loop_run.position(views[2].clone(), timesteps) is None
    assert hosting.loop_run.position(timesteps.double()[1], timesteps) is None
    assert hosting.loop_run.position(5.0, timesteps) is None
