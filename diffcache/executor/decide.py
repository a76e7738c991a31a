"""At one site, in one forward: compute, or predict from what was kept; and keep what later steps refer to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffcache import store
from diffcache.executor.guess import combine, problem
from diffcache.executor.state import Call
from diffcache.store import Anchor, Output


def visit(call: Call, site: str, x: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
    """The output of ``site``, one way or the other."""
    predicted = guess(call, site, x)
    if predicted is not None:
        return predicted[0]
    value = compute()
    keep(call, site, x, value)
    return value


def guess(call: Call, site: str, x: tuple[Tensor, ...]) -> tuple[Any] | None:
    """The predicted output in a tuple of one, or None where the step is to be computed; counts either."""
    program = call.state.programs[call.denoiser, site]
    counts = call.state.count(call.denoiser, site, call.branch)
    if call.step >= len(program.terms):
        counts.failed_open["step beyond the schedule"] += 1
        return None
    terms = program.terms[call.step]
    if terms is None:
        counts.computed += 1
        return None
    key = (call.denoiser, site, call.branch)
    anchors = [call.state.store.get(key, a) for a in terms.anchors]
    for step in program.drops[call.step]:
        call.state.store.drop(key, step)
    guidance = call.state.schedule.guidance
    branch = None if guidance is not None and guidance.mode == "batched" else call.branch
    obstacle = problem(anchors, terms, x, branch)
    if obstacle:
        counts.failed_open[obstacle] += 1
        return None
    counts.predicted += 1
    return (combine([a for a in anchors if a is not None], terms, x, branch),)


def keep(call: Call, site: str, x: tuple[Tensor, ...], value: Any) -> None:
    """Put what ``site`` returned into the store, if a later step refers to it and it is finite."""
    program = call.state.programs[call.denoiser, site]
    if call.step not in program.keeps:
        return
    output = Output.of(value)
    if not output.tensors:  # a type whose tensors cannot be reached: nothing can be made of it later
        return
    finite = store.all_finite(output.tensors)
    if finite is not None and finite.device.type != "cpu":
        call.state.suspects.append(finite)  # read when the run is over: no synchronisation inside the loop
    elif finite is not None and not finite:
        return
    kept_x = tuple(t.detach().clone() for t in x) if call.step in program.keeps_x else ()
    key = (call.denoiser, site, call.branch)
    call.state.store.put(key, call.step, Anchor(output.kept(), kept_x, store.signature(x)))
