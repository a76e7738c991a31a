"""What a run does otherwise than its schedule says is counted, logged and warned of in every run, with its reason."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from online import toy_schedule
from pipelines import TINY, run, shared
from probes import bound, hold
from small_loop import MASK, STEPS, Loop, Net, loop, noise
from torch import Tensor

import diffcache
from diffcache import CacheSchedule, accelerate, accelerated, report
from diffcache.documents import DenoiserPlan, Guidance, SitePlan
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.executor import FailedOpen, notices

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")]
ROOT = Path(__file__).parents[2]


def kinds(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.kind for record in caplog.records if record.name == "diffcache"]  # type: ignore[attr-defined]


# --- every run and kind ----------------------------------------------------------------------------------------------


def test_the_second_bad_run_is_logged_and_warned_of_as_the_first(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, "uniform:every=3"):
        for number in (1, 2, 3):
            with pytest.warns(FailedOpen, match="2 predictions were computed in full instead: shape"):
                pipe(noise())
            assert report(pipe).reasons == {"input-changed": 2}
            assert report(pipe).totals == {"input-changed": 2 * number}
    assert kinds(caplog) == ["input-changed"] * 3
    assert [(r.run, r.times, r.pipeline) for r in caplog.records] == [(n, 2, "Loop") for n in (1, 2, 3)]  # type: ignore[attr-defined]


def test_python_s_filter_of_repeated_warnings_does_not_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with warnings.catch_warnings(record=True) as heard, accelerated(pipe, "uniform:every=3"):
        warnings.simplefilter("default")
        pipe(noise())
        pipe(noise())
    assert len(heard) == 1
    assert kinds(caplog) == ["input-changed"] * 2


def test_a_good_run_after_a_bad_one_has_no_reasons_and_keeps_the_totals() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, "uniform:every=3"):
        pipe(noise())
        pipe.before = lambda i, x: x
        pipe(noise())
        assert report(pipe).reasons == {}
        assert report(pipe).totals == {"input-changed": 2}
        assert "over all runs: input-changed 2" in str(report(pipe))


def test_all_records_are_written_before_a_warning_becomes_an_error(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop(odd=lambda call, output: (output, torch.full((2,), float("nan"))))
    with accelerated(pipe, bound(pipe, hold(MASK))), warnings.catch_warnings():
        warnings.simplefilter("error", FailedOpen)
        with pytest.raises(FailedOpen):
            pipe(noise())
        assert report(pipe).reasons == {"non-finite-anchor": 4, "nothing-skipped": 1}
    assert kinds(caplog) == ["non-finite-anchor", "nothing-skipped"]


def test_the_library_prints_nothing_where_no_log_is_set_up() -> None:
    assert [type(handler) for handler in logging.getLogger("diffcache").handlers] == [logging.NullHandler]


def test_every_kind_is_documented() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    reasons = [value.kind for value in vars(notices).values() if isinstance(value, notices.Reason)]
    assert len(reasons) > 10
    whole = [
        "no-loop",
        "calls-overlap",
        "short-loop",
        "non-finite-output",
        "nothing-skipped",
        "mostly-skipped",
        "mismatch",
    ]
    for kind in [*reasons, notices.other_channels(3).kind, *whole]:
        assert f"| `{kind}` |" in text


# --- runs without a loop, and loops that end early -------------------------------------------------------------------


def test_calls_without_a_loop_are_counted_each(caplog: pytest.LogCaptureFixture) -> None:
    network = Net().requires_grad_(False).eval()
    accelerate(network, "uniform:every=2")
    x, t, p = noise(), torch.tensor(5.0), torch.tensor(0.1)
    for number in (1, 2):
        network(hidden_states=x, timestep=t, prompt=p)
        assert report(network).reasons == report(network).totals == {"no-loop": number}
        assert "outside of diffcache.trajectory" in str(report(network))
    with diffcache.trajectory(network, [3.0, 2.0, 1.0]):
        for _ in range(3):
            network(hidden_states=x, timestep=t, prompt=p)
    assert report(network).reasons == {}
    assert report(network).totals == {"no-loop": 2}
    assert kinds(caplog) == ["no-loop", "no-loop"]


def test_a_short_loop_is_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    network = Net().requires_grad_(False).eval()
    accelerate(network, "uniform:every=2")
    for _ in range(2):
        with diffcache.trajectory(network, [4.0, 3.0, 2.0, 1.0]):
            for _ in range(3):
                network(hidden_states=noise(), timestep=torch.tensor(5.0), prompt=torch.tensor(0.1))
    assert report(network).reasons == {"short-loop": 1}
    assert report(network).totals == {"short-loop": 2}
    assert kinds(caplog) == ["short-loop"] * 2


# --- why an anchor is missing ----------------------------------------------------------------------------------------


def test_a_late_start_is_called_so() -> None:
    pipe = shared("flux_img2img")
    call = TINY["flux_img2img"].call(pipe)
    steps = len(set_timesteps(pipe, call))
    with accelerated(pipe, bound(pipe, hold("#" + "." * (steps - 1)))):
        run(pipe, call)
        (reason,) = report(pipe).rows[0].failed_open
    assert reason == "an anchor is missing: late start, the loop began after that step"


def set_timesteps(pipe: object, call: dict[str, object]) -> Tensor:
    run(pipe, call)  # type: ignore[arg-type]
    return pipe.scheduler.timesteps  # type: ignore[attr-defined,no-any-return]


def test_another_denoiser_s_turn_is_called_so() -> None:
    pipe = shared("wan22")
    call = TINY["wan22"].call(pipe)
    steps = len(set_timesteps(pipe, call))
    with accelerated(pipe, bound(pipe, hold("#" + "." * (steps - 1)))):
        run(pipe, call)
        assert set(report(pipe).reasons) == {"other-denoiser"}


class Branching(Loop):
    """Calls its network once at the even steps, and twice at the odd ones."""

    def ask(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        if len(self.given) % 3 == 1:
            super().ask(x, t, prompt)
        return super().ask(x, t, prompt)


def test_a_branch_that_did_not_run_is_called_so() -> None:
    pipe = Branching(Net().requires_grad_(False), loop().scheduler)
    pipe.set_progress_bar_config(disable=True)
    with accelerated(pipe, "uniform:every=2"):
        pipe(noise())
        assert "branches-changed" in report(pipe).reasons


def test_a_site_that_did_not_run_is_called_so() -> None:
    pipe = loop()
    pipe.before = lambda i, x: (setattr(pipe.transformer, "left_out", (2,) if i in (0, 4) else ()), x)[1]
    with accelerated(pipe, "uniform:every=4,sites=block"):
        pipe(noise())
        assert report(pipe).reasons == {"site-not-run": 6}


def test_a_loop_that_goes_back_is_called_so() -> None:
    pipe = loop()

    @torch.no_grad()
    def goes_back(pipe: Loop, x: Tensor) -> None:
        pipe.scheduler.set_timesteps(STEPS)
        times = pipe.scheduler.timesteps
        with pipe.progress_bar(total=STEPS):
            for i in (0, 1, 2, 3, 4, 5, 1, 2):
                pipe.transformer(hidden_states=x, timestep=times[i], prompt=torch.tensor(0.0))
                pipe.scheduler.step(x, times[i], x)
                pipe.scheduler._step_index = None

    with accelerated(pipe, "uniform:every=4"):
        goes_back(pipe, noise())
        assert report(pipe).reasons == {"loop-went-back": 2}


# --- predictions that are not finite ---------------------------------------------------------------------------------


def overflowing() -> tuple[Loop, CacheSchedule]:
    """Outputs near the largest float32, of which one prediction takes twice as much."""
    pipe = loop(odd=lambda call, output: torch.full_like(output, 3e38) if call == 0 else output)
    weights = np.array([0, 2, 0, 1, 1, 0, 1, 1.0])[None, :, None]
    return pipe, bound(pipe, SitePlan(compute=weights[0, :, 0] == 0, weights=weights))


def test_a_prediction_that_is_not_finite_is_computed_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    pipe, schedule = overflowing()
    pipe.before = lambda i, x: noise() if i == 1 else x  # the state survives the large output
    with accelerated(pipe, schedule):
        assert torch.isfinite(pipe(noise())).all()
        assert report(pipe).reasons == {"non-finite-prediction": 1}
        assert (report(pipe).computed, report(pipe).predicted) == (4, 4)
        assert len(pipe.transformer.seen) == 4
    assert kinds(caplog) == ["non-finite-prediction"]


def test_what_is_known_only_after_the_run_is_reported_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: a flag is kept, and read once when the run is over."""
    monkeypatch.setattr("diffcache.host.in_parts", lambda pipe: ["transformer"])
    pipe, schedule = overflowing()
    read: list[int] = []
    stack = torch.stack

    def counted(tensors: Sequence[Tensor]) -> Tensor:
        read.append(len(tensors))
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", counted)
    with accelerated(pipe, schedule):
        pipe.before = lambda i, x: noise() if i in (1, 2) else x
        pipe(noise())
        assert report(pipe).reasons == {"non-finite-prediction": 1}
        assert "1 prediction(s) had NaN or Inf in them and were used: the result is suspect" in str(report(pipe))
    assert read == [2 * STEPS]  # of every output that was kept, and of every prediction
    assert kinds(caplog) == ["non-finite-prediction"]


def test_inside_the_network_too(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop()
    plan = hold("#...#...")
    object.__setattr__(plan, "weights", plan.weights * 1e60)  # no document allows that
    with accelerated(pipe, bound(pipe, plan, "block")):
        assert torch.isfinite(pipe(noise())).all()
        assert report(pipe).reasons == {"non-finite-prediction": 18, "nothing-skipped": 1}
    assert kinds(caplog) == ["non-finite-prediction", "nothing-skipped"]


# --- how much was skipped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "kind"), [(1e9, "mostly-skipped"), (1e-12, "nothing-skipped"), (0.0, "nothing-skipped")]
)
@pytest.mark.parametrize("rule", ["first_block", "output_rate"])
def test_a_threshold_that_decides_nothing_is_reported(
    rule: str, limit: float, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = loop()
    with accelerated(pipe, toy_schedule(rule, limit, steps=16)):  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.warns(FailedOpen, match=rule):
                pipe(noise(), steps=16)
            assert report(pipe).reasons == {kind: 1}
    assert kinds(caplog) == [kind] * 2


def test_a_schedule_that_skips_as_much_as_it_was_asked_to_says_nothing() -> None:
    pipe = loop()
    with accelerated(pipe, bound(pipe, hold("#" + "." * 15))):
        pipe(noise(), steps=16)
        assert report(pipe).reasons == {}
        assert report(pipe).skipped == 15 / 16
    with accelerated(pipe, "full"):
        pipe(noise())
        assert report(pipe).reasons == {}


def test_a_rule_that_computes_the_first_steps_of_a_short_loop_is_reported_to_skip_nothing() -> None:
    pipe = loop()
    with accelerated(pipe, "easycache:warmup=20"), pytest.warns(FailedOpen, match="computes all steps"):
        pipe(noise(), steps=16)
    with accelerated(pipe, "easycache:threshold=0,warmup=12"), pytest.warns(FailedOpen, match="every step"):
        pipe(noise(), steps=16)


def test_a_run_that_enters_computed_steps_only_is_reported_to_skip_nothing() -> None:
    pipe = shared("flux_img2img")
    call = TINY["flux_img2img"].call(pipe)
    steps = len(set_timesteps(pipe, call))
    with accelerated(pipe, bound(pipe, hold("#." + "#" * (steps - 2)))):
        run(pipe, call)
        assert report(pipe).reasons == {"nothing-skipped": 1}
        assert "the schedule computes all steps that this run entered" in str(report(pipe))


def test_a_run_that_was_broken_off_is_not_judged_by_its_work() -> None:
    pipe = loop()

    def breaks(i: int, x: Tensor) -> Tensor:
        if i == 1:
            raise KeyError("stop")
        return x

    pipe.before = breaks
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(KeyError):
            pipe(noise())
        assert report(pipe).totals == {}


@pytest.mark.parametrize(
    ("spec", "computed", "predicted", "skipped"),
    [
        ("uniform:every=2", 4, 4, 0.5),
        ("uniform:every=2,sites=block", 4, 4, 0.5),
        ("uniform:every=4,sites=sublayer", 2, 6, 0.75),
        ("uniform:every=4,sites=stack", 2, 6, 0.75),
        ("full", 8, 0, 0.0),
    ],
)
def test_a_report_states_the_work_at_inner_sites(spec: str, computed: int, predicted: int, skipped: float) -> None:
    pipe = loop()
    with accelerated(pipe, spec):
        pipe(noise())
        found = report(pipe)
    assert (found.computed, found.predicted, found.skipped) == (computed, predicted, skipped)
    assert f"{computed} computed in full, {predicted} predicted" in str(found)
    assert f"{skipped:.0%} of the" in str(found)


# --- runs that do not fit --------------------------------------------------------------------------------------------


def other_steps(pipe: Loop) -> Tensor:
    return pipe(noise(), steps=1)


def other_scheduler(pipe: Loop) -> Tensor:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    return pipe(noise())


def other_branches(pipe: Loop) -> Tensor:
    pipe.guide = "separate"
    return pipe(noise())


def other_batch(pipe: Loop) -> Tensor:
    pipe.guide = "batched"
    pipe.ask = lambda x, t, p: Loop.ask(pipe, x + p, t, p)  # type: ignore[method-assign]
    return pipe(noise())


MISFITS: Sequence[tuple[Callable[[Loop], Tensor], Guidance | None, str]] = [
    (other_steps, None, "made for 8 steps; this run takes 1"),
    (other_scheduler, None, "of another configuration"),
    (other_branches, Guidance(mode="none", branches=1), "this run makes 2"),
    (other_batch, Guidance(mode="batched", branches=2), "does not repeat its samples"),
]


@pytest.mark.parametrize(("change", "guidance", "why"), MISFITS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_run_that_does_not_fit_runs_in_full_where_that_is_allowed(
    change: Callable[[Loop], Tensor], guidance: Guidance | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = change(loop())
    pipe = loop()
    schedule = bound(pipe, hold(MASK), guidance=guidance)
    with accelerated(pipe, schedule), pytest.raises(ScheduleMismatch, match=why):
        change(pipe)
    assert kinds(caplog) == []
    pipe = loop()
    with accelerated(pipe, schedule, mismatch="full"):
        for number in (1, 2):
            assert torch.equal(change(pipe), plain)
            found = report(pipe)
            assert found.reasons == {"mismatch": 1}
            assert found.totals == {"mismatch": number}
            assert found.predicted == 0
            assert found.computed == len(pipe.given) > 0
            assert found.peak_bytes == 0 or change in (other_branches,)
            assert why in str(found)
    assert kinds(caplog) == ["mismatch"] * 2


def test_a_server_warms_up_with_one_step_and_then_skips() -> None:
    pipe = loop()
    schedule = bound(pipe, hold(MASK))
    with accelerated(pipe, schedule):
        wanted = pipe(noise())
    accelerate(pipe, schedule, mismatch="full")
    pipe(noise(), steps=1)
    assert torch.equal(pipe(noise()), wanted)
    assert report(pipe).reasons == {}
    assert report(pipe).predicted == 4
    assert report(pipe).totals == {"mismatch": 1}
    assert report(pipe).runs == 2


def test_a_run_over_moved_noise_levels_is_refused_once_it_has_begun() -> None:
    """It is not the untouched pipeline's run any more."""
    pipe = loop()
    pipe.scheduler.set_timesteps(STEPS)
    schedule = bound(pipe, hold(MASK), guidance=Guidance(mode="none", branches=1))
    levels = pipe.scheduler.sigmas.double().numpy().copy()
    levels[3] = (levels[3] + levels[4]) / 2
    fields = {name: getattr(schedule, name) for name in ("steps", "denoisers", "noise_scheduler", "guidance")}
    pipe.guide = "separate"
    moved = CacheSchedule(**fields, sigmas=levels)
    with accelerated(pipe, moved, mismatch="full"), pytest.raises(ScheduleMismatch, match="this run makes 2"):
        pipe(noise())


def test_a_network_that_was_replaced_is_refused_all_the_same() -> None:
    """Every later run would be in full as well, so the error is about the pipeline and not about the request."""
    pipe = loop()
    with accelerated(pipe, bound(pipe, hold(MASK)), mismatch="full"):
        pipe.transformer = Net().requires_grad_(False)
        with pytest.raises(ScheduleMismatch, match="another object than when it was accelerated"):
            pipe(noise())


def test_another_value_is_refused() -> None:
    with pytest.raises(BadOption, match=r"mismatch='skip' was given\. Allowed: 'refuse', 'full'"):
        accelerate(loop(), "full", mismatch="skip")  # type: ignore[arg-type]


def test_a_network_of_one_s_own_too() -> None:
    network = Net().requires_grad_(False).eval()
    plan = DenoiserPlan(sites={"model": hold("#.#.")})
    accelerate(network, CacheSchedule(steps=4, denoisers={"network": plan}), mismatch="full")
    with diffcache.trajectory(network, [2.0, 1.0]):
        for _ in range(2):
            network(hidden_states=noise(), timestep=torch.tensor(5.0), prompt=torch.tensor(0.1))
    assert report(network).reasons == {"mismatch": 1}
