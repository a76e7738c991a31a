"""Make the notices that are known only when a run is over: NaN or Inf, and too little or too much skipped."""

from __future__ import annotations

from collections.abc import Iterator

from diffcache.executor.notices import NON_FINITE_PREDICTION, Notice
from diffcache.executor.program import decides
from diffcache.executor.state import RunState

MOSTLY = 0.8  # share of the forwards; above it, a limit that is decided by in the run no longer guards anything

_NOT_FINITE = {
    "non-finite-output": "output(s) of the denoiser had NaN or Inf in them and predictions were made from them",
    NON_FINITE_PREDICTION.kind: "prediction(s) had NaN or Inf in them and were used",
}


def about_finiteness(state: RunState) -> Iterator[Notice]:
    """Yield a notice for each kind of tensors that are not finite. The check waits for their devices."""
    for kind, times in sorted(state.not_finite().items()):
        yield Notice(kind, times, f"{times} {_NOT_FINITE[kind]}: the result is suspect")


def about_work(state: RunState, *, predicts: bool) -> Iterator[Notice]:
    """Yield a notice if a whole run skipped nothing, or if its rule decided to skip nearly everything.

    Args:
        state: The state of the run.
        predicts: Whether the schedule has predictions.
    """
    forwards = state.forwards
    if predicts and forwards and not any(f.skipped for f in forwards):
        yield Notice("nothing-skipped", 1, f"nothing was skipped in {len(forwards)} forwards: {_why_nothing(state)}")
    for name, plan in state.schedule.denoisers.items():
        own = [f.skipped > 0 for f in forwards if f.denoiser == name]
        # A rule that keeps the anchors of the plan only computes more than the plan does.
        if plan.online is None or not decides(plan) or not own or sum(own) <= MOSTLY * len(own):
            continue
        share = f"{sum(own)} of {len(own)} forwards ({sum(own) / len(own):.0%})"
        yield Notice(
            "mostly-skipped",
            1,
            f"{name}: {share} were predicted, as the rule {plan.online.rule!r} decided in the run. With so few "
            "computed steps, the result is seldom close to the full run. Choose a lower limit (the threshold of a "
            "rule), and compare both runs with diffcache.evaluate.",
        )


def _why_nothing(state: RunState) -> str:
    """Return why nothing was skipped, for a notice."""
    schedule = state.schedule
    ran = {f.step for f in state.forwards}
    asked = any(step < len(p.compute) and not p.compute[step] for _, _, p in schedule.plans() for step in ran)
    if not asked:
        return f"the schedule computes all steps that this run entered (from step {min(ran)} of {schedule.steps})"
    if failed := state.failures():
        return f"predictions were computed in full instead ({', '.join(sorted({n.kind for n in failed}))})"
    rules = sorted({plan.online.rule for plan in schedule.denoisers.values() if plan.online is not None})
    names = ", ".join(map(repr, rules))
    return f"the rule {names} decided to compute every step. Choose a higher limit (the threshold of a rule)"
