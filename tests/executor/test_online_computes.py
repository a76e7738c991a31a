"""Where a rule that decides in the run may skip nothing, and schedules without such a rule."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from online import INSIDE, RULES, STEPS, decided, governed, plain, played, strips, toy_schedule
from pipelines import TINY, run, shared
from probes import BRANCHES, names, ours
from small_loop import Loop, Net, loop, noise
from torch import Tensor

from diffcache import accelerated, report
from diffcache.executor import FailedOpen
from diffcache.executor.decider import Decider

# --- where nothing may be skipped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["flux", "flux_true_cfg", "flux2", "dit", "sd3", "wan", "z_image", "lumina2", "ltx2"])
def test_with_a_limit_of_nothing_the_bits_are_those_of_the_untouched_pipeline(name: str, rule: str) -> None:
    pipe = shared(name)
    expected = plain(name)  # a first run leaves attributes on the parts
    before = names(pipe)
    with accelerated(pipe, decided(pipe, rule, 0.0)):
        output = run(pipe, TINY[name].call(pipe), num_inference_steps=STEPS)
        found = report(pipe)
    assert torch.equal(output, expected)
    assert not any(row.predicted or row.failed_open for row in found.rows)
    assert found.computed == STEPS * BRANCHES[TINY[name].guidance]
    assert found.bytes_held == 0
    assert names(pipe) == before
    assert ours(pipe) == []


@pytest.mark.parametrize("rule", RULES)
def test_runs_repeat_themselves_and_leave_nothing_for_the_next(rule: str) -> None:
    limit = 0.2 if rule == "drift" else 0.5
    one, first = played("flux", decided(shared("flux"), rule, limit))
    pipe = shared("flux")
    with accelerated(pipe, decided(pipe, rule, limit)):
        run(pipe, TINY["flux"].call(pipe), seed=7, num_inference_steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS, callback_on_step_end=interrupt)
        other = run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS)
        again = report(pipe)
    assert torch.equal(one, other)
    assert [row.strip for row in first.rows] == [row.strip for row in again.rows]
    assert ours(pipe) == []


def interrupt(pipe: Any, i: int, t: Any, kept: Any) -> Any:
    if i == 4:
        raise KeyboardInterrupt
    return kept


@pytest.mark.parametrize("rule", RULES)
def test_nan_in_the_state_computes(rule: str) -> None:
    def spoil(pipe: Any, i: int, t: Any, kept: Any) -> Any:
        return {"latents": kept["latents"] * (float("nan") if i == 4 else 1.0)}

    pipe = shared("flux")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)
        _, found = played("flux", decided(pipe, rule), callback_on_step_end=spoil)
    (strip,) = strips(found, governed(pipe, rule))
    assert strip[5:] == "■" * (STEPS - 5)
    assert "·" in strip[:5]


@pytest.mark.parametrize("rule", ["first_block", "output_rate", "drift"])
def test_another_resolution_in_mid_run_is_computed_and_reported(rule: str) -> None:
    """And what was computed serves from there on: the newest output is the anchor. A guard changes no anchors."""
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, toy_schedule(rule)):
        with pytest.warns(FailedOpen, match="shape, dtype or device of the input changed"):
            pipe(noise())
        (strip,) = strips(report(pipe), "stack:blocks" if rule in INSIDE else "model")
        assert report(pipe).bytes_held == 0
    assert strip == {"first_block": "■···■···", "output_rate": "■■··■■··", "drift": "■···■■■■"}[rule]


@pytest.mark.parametrize("views", [True, False])
def test_a_loop_that_goes_back_begins_anew(views: bool) -> None:
    pipe = TwiceLoop(Net().requires_grad_(False), loop().scheduler)
    pipe.views = views
    pipe.set_progress_bar_config(disable=True)
    for rule in ("first_block", "output_rate"):
        with accelerated(pipe, toy_schedule(rule)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FailedOpen)
            pipe(noise())
            strip = strips(report(pipe), "stack:blocks" if rule in INSIDE else "model")[0]
        begins = "■■" if rule == "output_rate" else "■"
        # Where the denoiser is not given the noise scheduler's own timesteps, the second round's first step is known as
        # such when it is over; then nothing is left of what came before.
        again = begins if views else "■" + begins
        assert strip[:8] == begins + "·" * (8 - len(begins)), rule
        assert strip[8:] == again + "·" * (8 - len(again)), rule


class TwiceLoop(Loop):
    views = True

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int = 8) -> Tensor:
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            for _ in range(2):
                self.scheduler._step_index = None
                for t in self.scheduler.timesteps:
                    output = self.ask(x, t if self.views else t * 1, torch.tensor(0.1))
                    x = self.scheduler.step(output, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return x


def test_a_site_that_runs_before_the_deciding_block_is_computed() -> None:
    """A host that leaves the first block out."""
    pipe = loop()
    untouched = loop()
    pipe.transformer.left_out = untouched.transformer.left_out = (0,)
    with accelerated(pipe, toy_schedule("first_block")):
        with pytest.warns(FailedOpen, match="the block that decides did not run before it"):
            output = pipe(noise())
    assert torch.equal(output, untouched(noise()))


# --- schedules without a rule ----------------------------------------------------------------------------------------


def test_without_a_rule_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a schedule without an online rule was watched")

    for name in ("__init__", "decide", "observe"):
        monkeypatch.setattr(Decider, name, never)
    _, found = played("flux", "uniform:every=2")
    assert found.predicted == STEPS // 2
    assert found.online == {}
    assert "decided in the run" not in str(found)
    with pytest.raises(AssertionError, match="was watched"):
        played("flux", decided(shared("flux"), "drift"))
