"""At one site, in one forward: compute, or predict from what was kept; and keep what later steps refer to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffcache import store
from diffcache.executor.guess import combine, problem
from diffcache.executor.program import NEWEST
from diffcache.executor.state import Call
from diffcache.executor.streams import Inputs, Pairing, pair
from diffcache.kernels import Format
from diffcache.store import Anchor, Kept, Output


def visit(call: Call, site: str, inputs: Inputs, compute: Callable[[], Any]) -> Any:
    """The output of ``site``, one way or the other."""
    try:
        predicted = guess(call, site, inputs)
        if predicted is not None:
            if call.state.lesson is not None:
                call.state.lesson(call, site, compute())
            return predicted[0]
        inputs = safe(call, site, inputs)
        value = compute()
        keep(call, site, inputs, value)
        return value
    finally:
        call.visits[site] += 1


def guess(call: Call, site: str, inputs: Inputs) -> tuple[Any] | None:
    """The predicted output in a tuple of one, or None where the step is to be computed; counts either."""
    program = call.state.programs[call.denoiser, site]
    counts = call.state.count(call.denoiser, site, call.branch)
    if call.step >= len(program.terms):
        counts.fail("step beyond the schedule")
        return None
    terms = program.terms[call.step]
    if terms is None:
        counts.compute()
        return None
    key = call.key(site)
    anchors = [call.state.store.get(key, a) for a in terms.anchors]
    for step in program.drops[call.step]:
        call.state.store.drop(key, step)
    if program.newest and call.verdict is None:
        counts.fail("the block that decides did not run before it")
        return None
    if call.verdict is not None and not call.verdict.predict:
        if call.verdict.reason:
            counts.fail(call.verdict.reason)
        elif program.newest:
            counts.compute()
        else:
            counts.guard()
        return None
    guidance = call.state.schedule.guidance
    branch = None if guidance is not None and guidance.mode == "batched" else call.branch
    pairing = call.state.pairings.get(key)
    x = inputs.main if pairing is None else pairing.x(inputs)
    obstacle = problem(anchors, terms, x, branch, pairing, call.batch)
    if obstacle:
        counts.fail(obstacle)
        return None
    counts.predict()
    there = [a for a in anchors if a is not None]
    if call.state.lesson is not None:
        call.plain[site] = combine(there, terms.plain, x, branch, pairing, call.state.backend)
    return (combine(there, terms, x, branch, pairing, call.state.backend),)


def safe(call: Call, site: str, inputs: Inputs) -> Inputs:
    """The inputs as they are now, if they are to be kept: what is about to run may write into them."""
    program = call.state.programs[call.denoiser, site]
    if call.step not in program.keeps_x:
        return inputs
    pairing = call.state.pairings.get(call.key(site))
    wanted = inputs.others if pairing is None else {n: t for n, t in inputs.others.items() if n in pairing.names}
    copies = {name: t.detach().clone() for name, t in wanted.items()}
    return Inputs(tuple(t.detach().clone() for t in inputs.main), copies)


def keep(call: Call, site: str, inputs: Inputs, value: Any, flow: Mapping[str, int] | None = None) -> None:
    """Put what ``site`` returned into the store, if a later step refers to it and it is finite.

    inputs  as ``safe`` gave them
    flow    as ``streams.pair`` needs it
    """
    program = call.state.programs[call.denoiser, site]
    if call.step not in program.keeps:
        return
    key = call.key(site)
    step = NEWEST if program.newest else call.step
    call.state.store.drop(key, step)
    output = Output.of(value)
    if not output.tensors:  # a type whose tensors cannot be reached: nothing can be made of it later
        return
    finite = store.all_finite(output.tensors)
    if finite is not None and (finite.device.type != "cpu" or call.state.together):
        call.state.suspects.append(finite)  # read when the run is over: no synchronisation inside the loop
    elif finite is not None and not finite:
        return
    x, pairing = inputs.main, None
    if program.reads_x:
        call.state.pairings[key] = pairing = pair(inputs, output.tensors, flow or {})
        x = pairing.x(inputs)
    keeping = call.state.keeping(call.denoiser, site, output.tensors[0].device)
    kept_x: tuple[Kept, ...] = ()
    differs = call.step in program.differences
    own = own_inputs(output.tensors, x, pairing, keeping.how) if differs else None
    if own is not None:
        kept = tuple(keeping.keep_difference(f, x_f) for f, x_f in zip(output.tensors, own, strict=True))
    else:
        kept = tuple(keeping.keep(t) for t in output.tensors)
        kept_x = tuple(keeping.keep(t, mine=True) for t in x) if call.step in program.keeps_x else ()
    anchor = Anchor(output.form(), kept, kept_x, store.signature(x), difference=own is not None)
    call.state.store.put(key, step, anchor)


def own_inputs(
    outputs: Sequence[Tensor], x: Sequence[Tensor], pairing: Pairing | None, how: Format | None
) -> list[Tensor] | None:
    """The input that every output carries on, where the difference of each is what is kept; None: outputs are."""
    if pairing is None or pairing.unclear or not all(store.fewer_bytes(f, how) for f in outputs):
        return None
    own = [x[i] for i in pairing.own if i is not None]
    fits = len(own) == len(outputs) and all(t.shape == f.shape for t, f in zip(own, outputs, strict=True))
    return own if fits else None
