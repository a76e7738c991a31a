"""A stack's pass through one forward, block by block: computed, or predicted from where the prediction begins.

At a predicted step every block hands on a copy of the stack's predicted output, and the last one the output itself.
What the host adds in between (ControlNet residuals) is lost with the copy; the prediction holds it. Where the parts of
a stack differ, as in the deep branch of a U-Net, each hands on zeros in the form of what it returned when it ran: only
other parts of the stack ever see them.

A criterion can decide inside the first block of the first stack of its plan. With ``Where.FIRST_BLOCK`` that block
always runs, and its stack is what follows it. The residual is looked at where the next block begins: the inputs of that
block show which output is which stream. With ``Where.FIRST_NORM`` the block begins, and is left at its first
normalisation if the step turns out to be predicted, by an exception of our own that passes through this one block only.
So no forward is copied, and nothing but the normalisation is computed in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcache.executor.criteria import Where
from diffcache.executor.notices import NO_SIGNAL
from diffcache.executor.pairing import Inputs, pair
from diffcache.executor.site import guess, keep, safe
from diffcache.executor.state import Call, Lead, Stack
from diffcache.executor.store import Output
from diffcache.executor.watch import Verdict


@dataclass(frozen=True, slots=True)
class Place:
    """Of a block in its stack.

    where  where in this stack's first block the criterion decides, None if it decides nothing there
    part   its number, where the parts of the stack differ: then none can hand on what another one returns
    """

    first: bool
    last: bool
    where: Where | None = None
    part: int | None = None


class _PredictedError(Exception):
    """The step is predicted: leave the block that is running. Raised and caught here."""


def run_block(call: Call, site: str, place: Place, inputs: Inputs, compute: Callable[[], Any]) -> Any:
    """What one block of the stack ``site`` hands on. ``compute`` runs it."""
    stack = call.stacks.get(site)
    if stack is not None and stack.left:  # the host runs its blocks once more
        stack, call.visits[site] = None, call.visits[site] + 1
    if stack is None and place.first and place.where is Where.FIRST_BLOCK:
        given = Inputs(tuple(t.detach().clone() for t in inputs.main), inputs.others)  # blocks may write into it
        value = compute()
        call.lead = Lead(given, Output.of(value).tensors)
        return value
    begun = None
    if stack is None:
        if place.first and place.where is Where.FIRST_NORM:
            inputs, begun = _begin(call, site, inputs, compute)
        elif place.where is Where.FIRST_BLOCK:
            _follow(call, site, inputs)
        predicted = guess(call, site, inputs)  # at the first block that runs: hosts can be told to leave some out
        if predicted is None and begun is None:
            inputs = safe(call, site, inputs)
        stack = call.stacks[site] = Stack(inputs, predicted)
        if place.where is Where.FIRST_BLOCK and call.lead is not None:
            stack.before = call.lead.outputs
    stack.left = place.last
    if stack.guess is None:
        if call.state.programs[call.denoiser, site].reads_x:
            _learn(call, site, inputs, stack.before)
        value = compute() if begun is None else begun[0]
        if place.part is not None:
            call.state.blanks[call.key(site), place.part] = Output.of(value).blank()
        stack.before = () if place.last else Output.of(value).tensors
        if place.last:
            keep(call, site, stack.inputs, value, call.state.flows.get((call.denoiser, site)))
        return value
    if call.state.lesson is not None:  # every block runs, and the last one's output is what was to be predicted
        value = compute()
        if not place.last:
            return value
        call.state.lesson(call, site, value)
    if place.last:
        return stack.guess[0]
    if place.part is not None:
        blank = call.state.blanks.get((call.key(site), place.part))
        return compute() if blank is None else blank.copied()  # T2I-Adapters add to it in place
    if stack.stand_in is None:
        stack.stand_in = Output.of(stack.guess[0]).copied()
    return stack.stand_in


def _begin(call: Call, site: str, inputs: Inputs, compute: Callable[[], Any]) -> tuple[Inputs, tuple[Any] | None]:
    """Run the block until its first normalisation decides: the inputs as they were, and what it returned in a tuple of
    one; None where it was left."""
    kept = inputs

    def heard(signal: tuple[Tensor, ...]) -> None:
        nonlocal kept
        call.decide(signal)
        if call.predicts:
            raise _PredictedError
        kept = safe(call, site, inputs)

    call.heard = heard
    try:
        value = compute()
        return kept, (value,)
    except _PredictedError:
        return kept, None
    finally:
        call.heard = None


def _follow(call: Call, site: str, inputs: Inputs) -> None:
    """Decide by the residual of the block that ran before this one."""
    lead = call.lead
    if lead is None or not lead.outputs:  # left out by the host, or nothing to be read from it
        return
    _learn(call, site, inputs, lead.outputs)
    own = pair(lead.inputs, lead.outputs, call.state.flows.get((call.denoiser, site), {})).own
    if 0 not in own:
        call.verdict = Verdict(False, NO_SIGNAL)
        return
    call.decide((lead.outputs[own.index(0)] - lead.inputs.main[0],))


def _learn(call: Call, site: str, inputs: Inputs, before: tuple[Tensor, ...]) -> None:
    """Which output of the block before became which input of this one, told by identity; the same in every forward."""
    key = (call.denoiser, site)
    if not before or key in call.state.flows or len(before) < 2:
        return
    flow = {name: j for name, given in inputs.named().items() for j, t in enumerate(before) if given is t}
    if flow:
        call.state.flows[key] = flow
