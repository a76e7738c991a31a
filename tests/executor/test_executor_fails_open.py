"""The executor computes what it cannot predict in full, counts it and reports it."""

from __future__ import annotations

import warnings

import pytest
import torch
from probes import bound, hold, ours
from small_loop import MASK, STEPS, Loop, assert_fails_open, loop, noise, random_plan
from torch import Tensor

from diffcache import accelerated, report
from diffcache.executor import FailedOpen

pytestmark = pytest.mark.fast

NAN = float("nan")


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_an_output_that_is_not_finite_does_not_become_an_anchor(bad: float) -> None:
    """Step 3 gives NaN: step 4, which would refer to it, is computed; steps 6 and 7 refer to step 5 and are not."""
    pipe = loop(odd=lambda call, output: (output, torch.full((2,), bad if call == 2 else 1.0)))
    with accelerated(pipe, bound(pipe, hold(MASK))):  # computed: 0, 2, 3, 5
        with pytest.warns(FailedOpen, match="transformer/model: 1 predictions .* an anchor is missing"):
            pipe(noise())
        (row,) = report(pipe).rows
        assert (row.computed, row.predicted, dict(row.failed_open)) == (
            4,
            3,
            {"an anchor is missing: non-finite output (NaN or Inf) at that step": 1},
        )
        assert report(pipe).computed == len(pipe.transformer.seen) == 5


def test_a_failed_prediction_is_the_untouched_computation() -> None:
    """With nothing but failures left, the bits are those of the untouched loop."""
    plain = loop(odd=lambda call, output: (output, torch.full((2,), NAN)))(noise())
    pipe = loop(odd=lambda call, output: (output, torch.full((2,), NAN)))
    found = assert_fails_open(pipe, bound(pipe, hold(MASK)), "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_another_resolution_in_mid_run_is_computed_until_there_are_anchors_of_it() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    assert_fails_open(pipe, "uniform:every=3", "shape, dtype or device of the input changed", failed=2)


def test_another_type_in_mid_run_is_computed_until_there_are_anchors_of_it() -> None:
    pipe = loop()
    pipe.before = lambda i, x: (pipe.transformer.to(torch.float64 if i >= 4 else torch.float32), x)[1]
    pipe.ask = lambda x, t, p: Loop.ask(  # type: ignore[method-assign]
        pipe, x.to(pipe.transformer.blocks[0].attn.mix.weight.dtype), t, p
    )
    assert_fails_open(pipe, "uniform:every=3", "shape, dtype or device of the input changed", failed=2)


def test_another_output_for_the_same_input_is_computed() -> None:
    """Two anchors of different shapes make no linear combination."""
    pipe = loop(odd=lambda call, output: torch.cat([output, output], 1) if call % STEPS == 0 else output)
    plan = random_plan("#.#.####", 1, 2, kappa=False)
    assert_fails_open(pipe, bound(pipe, plan), "dtype or device of the output changed", failed=1)


def test_outputs_whose_tensors_cannot_be_reached_are_computed() -> None:
    class Opaque(list):  # type: ignore[type-arg]
        """A type that is not registered with torch's pytree."""

    plain = loop(odd=lambda call, output: Opaque([output]))(noise())
    pipe = loop(odd=lambda call, output: Opaque([output]))
    schedule = bound(pipe, hold(MASK))
    found = assert_fails_open(pipe, schedule, "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_kappa_without_an_input_of_the_output_s_shape_is_computed() -> None:
    pipe = loop(odd=lambda call, output: output[:, :4])
    pipe.ask = (
        lambda x, t, p: torch.cat(  # type: ignore[method-assign]
            [pipe.transformer(hidden_states=x, timestep=t, prompt=p)[0], x[:, 4:]], dim=1
        )
    )
    plan = random_plan("#.######", 1, 1)
    assert_fails_open(pipe, bound(pipe, plan), "so coefficients of inputs have no meaning", failed=1)


def test_coefficients_for_another_number_of_channels_are_not_used() -> None:
    pipe = loop()
    plan = random_plan("#.######", 1, 1, channels=7)
    assert_fails_open(pipe, bound(pipe, plan), "does not have the 7 channels", failed=1)


def test_a_step_beyond_the_schedule_is_computed() -> None:
    """A loop that takes more steps than its noise scheduler has timesteps."""
    pipe = loop()
    schedule = bound(pipe, hold("#.#."))
    with accelerated(pipe, schedule):
        pipe.scheduler.set_timesteps(4)
        timesteps = pipe.scheduler.timesteps
        with pytest.warns(FailedOpen, match="2 predictions were .*: step beyond the schedule"):
            ask_six_times_under_a_bar_of_four(pipe, timesteps)
        assert len(pipe.transformer.seen) == 4


@torch.no_grad()
def ask_six_times_under_a_bar_of_four(pipe: Loop, timesteps: Tensor) -> None:
    with pipe.progress_bar(total=4):
        for i in range(6):
            pipe.ask(noise(), timesteps[min(i, 3)] * 1, torch.tensor(0.0))  # a number: a view would show its step
            if i < 4:
                pipe.scheduler.step(noise(), timesteps[i], noise())


def test_one_warning_names_the_first_site_and_counts_the_others() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    says = r"transformer/block:blocks.0 and 2 more sites: 6 predictions were computed in full instead: shape"
    with accelerated(pipe, "uniform:every=3,sites=block"):
        with pytest.warns(FailedOpen, match=says) as heard:
            pipe(noise())
        assert len(heard) == 1


def test_a_warning_made_an_error_leaves_the_pipeline_usable() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, "uniform:every=3"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FailedOpen)
            with pytest.raises(FailedOpen):
                pipe(noise())
        assert report(pipe).bytes_held == 0
        assert report(pipe).totals == {"input-changed": 2}
        assert "step" not in vars(pipe.scheduler)
        with pytest.warns(FailedOpen):
            pipe(noise())
        assert report(pipe).totals == {"input-changed": 4}
    assert ours(pipe) == []


def test_a_prediction_made_in_spite_of_the_obstacle_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import site

    monkeypatch.setattr(site, "why_not", lambda anchors, *rest: None if anchors[0] else "an anchor is missing")
    pipe = loop(odd=lambda call, output: torch.cat([output, output], 1) if call % STEPS == 0 else output)
    plan = random_plan("#.#.####", 1, 2, kappa=False)
    with accelerated(pipe, bound(pipe, plan)), pytest.raises(RuntimeError, match="size of tensor"):
        pipe(noise())


def test_anchors_are_dropped_although_their_last_prediction_failed() -> None:
    pipe = loop()
    held: list[int] = []
    pipe.before = lambda i, x: (held.append(report(pipe).bytes_held), torch.cat([x, x], dim=1) if i == 4 else x)[1]
    with accelerated(pipe, "uniform:every=3"), pytest.warns(FailedOpen):
        pipe(noise())
    one = noise().numel() * 4
    # Computed: 0, 3, 6; the shape doubles at 4; 0 and 3 are dropped at 2 and 5, used or not.
    assert held == [0, one, one, 0, one, one, 0, 2 * one]
