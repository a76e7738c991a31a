"""Run the blocks of a stack in one forward, or predict the output of the stack.

At a predicted step every block returns a copy of the predicted output of the stack, and the last block returns the
output itself. What the network adds between blocks (ControlNet residuals) is added to the copy. The prediction already
contains it. If the parts of a stack differ, as in the deep branch of a U-Net, each returns zeros in the form of the
output that it returned when it ran. Only other parts of the stack use them.

A criterion can decide inside the first block of the first stack of its plan. With ``Where.FIRST_BLOCK`` that block
always runs, and the stack consists of the blocks after it. The residual is read when the next block begins, because the
inputs of that block show which output belongs to which stream. With ``Where.FIRST_NORM`` the block begins, and an
exception ends it at its first normalisation if the step is predicted. The exception passes through this block only. No
forward is copied, and at a predicted step the block computes nothing after its normalisation. With
``Where.TIME_EMBEDDING`` an argument of the first block decides, before the block begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcache.executor.criteria import TIME_EMBEDDING, Where
from diffcache.executor.decider import Verdict
from diffcache.executor.notices import NO_SIGNAL
from diffcache.executor.pairing import Inputs, pair
from diffcache.executor.site import snapshot, store_output, try_predict
from diffcache.executor.state import Call, FirstBlock, Stack
from diffcache.executor.store import Output


@dataclass(frozen=True, slots=True)
class BlockPosition:
    """The position of a block in its stack.

    Attributes:
        first: Whether it is the first block.
        last: Whether it is the last block.
        part: The number of the block if the parts of the stack differ, else None. Such parts cannot return the output
            of each other.
    """

    first: bool
    last: bool
    part: int | None = None


class _PredictedError(Exception):
    """Ends the block that is running, because the step is predicted. It is raised and caught in this module."""


def run_block(call: Call, site: str, position: BlockPosition, inputs: Inputs, compute: Callable[[], Any]) -> Any:
    """Return the output of one block of a stack, computed or predicted.

    Args:
        call: The forward that is running.
        site: The stack.
        position: The position of the block.
        inputs: The inputs of the block.
        compute: Runs the block and returns its output.
    """
    stack, where = call.stacks.get(site), call.decides_in(site)
    if stack is not None and stack.finished:  # the host runs its blocks once more
        stack, call.visits[site] = None, call.visits[site] + 1
    if stack is None and position.first and where is Where.FIRST_BLOCK:
        given = Inputs(tuple(t.detach().clone() for t in inputs.main), inputs.others)  # blocks may write into it
        value = compute()
        call.first_block = FirstBlock(given, Output.of(value).tensors)
        return value
    begun = None
    if stack is None:
        if position.first and where is Where.FIRST_NORM:
            inputs, begun = _run_to_first_norm(call, site, inputs, compute)
        elif where is Where.FIRST_BLOCK:
            _decide_by_first_block(call, site, inputs)
        elif position.first and where is Where.TIME_EMBEDDING and TIME_EMBEDDING in inputs.others:
            call.decide((inputs.others[TIME_EMBEDDING],))
        predicted = try_predict(call, site, inputs)  # at the first block that runs: some pipelines leave blocks out
        if predicted is None and begun is None:
            inputs = snapshot(call, site, inputs)
        stack = call.stacks[site] = Stack(inputs, predicted)
        if where is Where.FIRST_BLOCK and call.first_block is not None:
            stack.previous = call.first_block.outputs
    stack.finished = position.last
    if stack.prediction is None:
        if call.state.programs[call.denoiser, site].reads_x:
            _record_flow(call, site, inputs, stack.previous)
        value = compute() if begun is None else begun[0]
        if position.part is not None:
            call.state.placeholders[call.key(site), position.part] = Output.of(value).placeholder()
        stack.previous = () if position.last else Output.of(value).tensors
        if position.last:
            store_output(call, site, stack.inputs, value, call.state.flows.get((call.denoiser, site)))
        return value
    if call.state.on_prediction is not None:  # every block runs, and the last one's output is what was to be predicted
        value = compute()
        if not position.last:
            return value
        call.state.on_prediction(call, site, value)
    if position.last:
        return stack.prediction[0]
    if position.part is not None:
        placeholder = call.state.placeholders.get((call.key(site), position.part))
        return compute() if placeholder is None else placeholder.copied()  # T2I-Adapters add to it in place
    if stack.stand_in is None:
        stack.stand_in = Output.of(stack.prediction[0]).copied()
    return stack.stand_in


def _run_to_first_norm(
    call: Call, site: str, inputs: Inputs, compute: Callable[[], Any]
) -> tuple[Inputs, tuple[Any] | None]:
    """Run the first block until its first normalisation decides, and to its end if the step is computed.

    Returns:
        The inputs of the block before it ran, and its output in a tuple of one. The second is None if the step is
        predicted.
    """
    kept = inputs

    def on_first_norm(signal: tuple[Tensor, ...]) -> None:
        nonlocal kept
        call.decide(signal)
        if call.predicts:
            raise _PredictedError
        kept = snapshot(call, site, inputs)

    call.on_first_norm = on_first_norm
    try:
        value = compute()
        return kept, (value,)
    except _PredictedError:
        return kept, None
    finally:
        call.on_first_norm = None


def _decide_by_first_block(call: Call, site: str, inputs: Inputs) -> None:
    """Decide by the residual of the first block, when the block after it begins."""
    first_block = call.first_block
    if first_block is None or not first_block.outputs:  # left out by the host, or nothing to be read from it
        return
    _record_flow(call, site, inputs, first_block.outputs)
    own = pair(first_block.inputs, first_block.outputs, call.state.flows.get((call.denoiser, site), {})).own
    if 0 not in own:
        call.verdict = Verdict(False, NO_SIGNAL)
        return
    call.decide((first_block.outputs[own.index(0)] - first_block.inputs.main[0],))


def _record_flow(call: Call, site: str, inputs: Inputs, previous: tuple[Tensor, ...]) -> None:
    """Record which output of the block before is which input of this block.

    They are the same objects. The result is the same in every forward, so it is recorded once in a run.
    """
    key = (call.denoiser, site)
    if not previous or key in call.state.flows or len(previous) < 2:
        return
    flow = {name: j for name, given in inputs.named().items() for j, t in enumerate(previous) if given is t}
    if flow:
        call.state.flows[key] = flow
