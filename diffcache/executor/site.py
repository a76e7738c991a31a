"""Run one site in one forward: predict its output, or compute it and store it for later steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffcache.executor import notices, store
from diffcache.executor.notices import Reason
from diffcache.executor.pairing import Inputs, Pairing, pair
from diffcache.executor.prediction import predict_output, why_not
from diffcache.executor.program import NEWEST
from diffcache.executor.state import Call
from diffcache.executor.store import Anchor, Kept, Output
from diffcache.host.channels import find_sample
from diffcache.kernels import Format


def run_site(call: Call, site: str, inputs: Inputs, compute: Callable[[], Any]) -> Any:
    """Return the predicted or the computed output of ``site``.

    Args:
        call: The forward that is running.
        site: The name of the site.
        inputs: The inputs of the site.
        compute: Runs the site and returns its output.
    """
    try:
        predicted = try_predict(call, site, inputs)
        if predicted is not None:
            if call.state.on_prediction is not None:
                call.state.on_prediction(call, site, compute())
            return predicted[0]
        inputs = snapshot(call, site, inputs)
        value = compute()
        store_output(call, site, inputs, value)
        return value
    finally:
        call.visits[site] += 1


def try_predict(call: Call, site: str, inputs: Inputs) -> tuple[Any] | None:
    """Predict the output of ``site``, if the plan predicts it and nothing prevents it, and count the outcome.

    Args:
        call: The forward that is running.
        site: The name of the site.
        inputs: The inputs of the site.

    Returns:
        The prediction in a tuple of one, or None if the site must be computed.
    """
    program = call.state.programs[call.denoiser, site]
    counts = call.state.count(call.denoiser, site, call.branch)
    call.inner_calls += site != "model"
    if call.step >= len(program.terms):
        counts.fail(notices.BEYOND)
        return None
    terms = program.terms[call.step]
    if terms is None:
        counts.compute()
        return None
    key = call.key(site)
    anchors = [call.state.store.get(key, a) for a in terms.anchors]
    for step in program.drops[call.step]:
        call.state.store.drop(key, step)
    if call.doubt:
        counts.fail(call.doubt)
        return None
    if program.newest and call.verdict is None:
        counts.fail(notices.NO_DECISION)
        return None
    if call.verdict is not None and not call.verdict.predict:
        if call.verdict.reason:
            counts.fail(call.verdict.reason)
        elif program.newest:
            counts.compute()
        else:
            counts.guard()
        return None
    branch = call.state.layout.row(call.branch)
    pairing = call.state.pairings.get(key)
    x = inputs.main if pairing is None else pairing.x(inputs)
    there = [a for a in anchors if a is not None]
    if len(there) < len(anchors):
        gone = next(step for step, a in zip(terms.anchors, anchors, strict=True) if a is None)
        counts.fail(why_missing(call, key, gone))
        return None
    obstacle: Reason | None = None
    if branch is None and len(terms.weights) > 1 and call.batch != call.state.batch_at_start.get(call.denoiser):
        obstacle = notices.OTHER_BATCH
    if branch is not None and branch >= len(terms.weights) > 1:
        obstacle = notices.NO_ROW
    obstacle = obstacle or why_not(there, terms, x, branch, pairing, call.batch)
    if obstacle:
        counts.fail(obstacle)
        return None
    predicted = predict_output(there, terms, x, branch, pairing, call.state.backend)
    if not finite(call, notices.NON_FINITE_PREDICTION.kind, Output.of(predicted).tensors):
        counts.fail(notices.NON_FINITE_PREDICTION)
        return None
    counts.predict()
    call.predicted += 1
    if call.unsure:
        call.state.doubts.add((call.denoiser, call.step))
    if call.state.on_prediction is not None:
        call.uncorrected[site] = predict_output(there, terms.uncorrected, x, branch, pairing, call.state.backend)
    return (predicted,)


def why_missing(call: Call, key: Hashable, step: int) -> Reason:
    """Return why an anchor of a prediction is missing.

    Args:
        call: The forward that is running.
        key: The key of the site's anchors.
        step: The step of the missing anchor.
    """
    state = call.state
    if (key, step) in state.lost:
        return state.lost[key, step]
    before = [f for f in state.forwards[state.since :] if f.denoiser == call.denoiser and step in (f.step, NEWEST)]
    if not before and state.since:
        return notices.WENT_BACK
    if not before:
        late = call.step == state.start if step == NEWEST else step < state.start
        return notices.LATE_START if late else notices.OTHER_DENOISER
    return notices.SITE_NOT_RUN if any(f.branch == call.branch for f in before) else notices.OTHER_BRANCHES


def finite(call: Call, kind: str, tensors: Sequence[Tensor]) -> bool:
    """Return False if a tensor is known to hold NaN or Inf.

    On other devices than the CPU, and if several processes run the denoiser together, the result is True, and the
    tensors are checked when the run is over.

    Args:
        call: The forward that is running.
        kind: The kind of the notice, if the check fails later.
        tensors: The tensors to check.
    """
    if not call.state.together and all(t.device.type == "cpu" for t in tensors):
        found = store.all_finite(tensors)
        return found is None or bool(found)
    call.state.pending_finite_checks.append((kind, store.ends(tensors)))
    return True


def snapshot(call: Call, site: str, inputs: Inputs) -> Inputs:
    """Copy the inputs of ``site`` if the plan keeps them, because the site may write into them.

    Args:
        call: The forward that is running.
        site: The name of the site.
        inputs: The inputs of the site.

    Returns:
        The copies, or ``inputs`` if the plan does not keep them.
    """
    program = call.state.programs[call.denoiser, site]
    if call.step not in program.keeps_x:
        return inputs
    pairing = call.state.pairings.get(call.key(site))
    wanted = inputs.others if pairing is None else {n: t for n, t in inputs.others.items() if n in pairing.names}
    copies = {name: t.detach().clone() for name, t in wanted.items()}
    return Inputs(tuple(t.detach().clone() for t in inputs.main), copies)


def store_output(call: Call, site: str, inputs: Inputs, value: Any, flow: Mapping[str, int] | None = None) -> None:
    """Store the output of ``site``, if a later step refers to it and it is finite.

    Args:
        call: The forward that is running.
        site: The name of the site.
        inputs: The inputs, as ``snapshot`` returned them.
        value: The output of the site.
        flow: See ``pairing.pair``.
    """
    program = call.state.programs[call.denoiser, site]
    if call.step not in program.keeps:
        return
    key = call.key(site)
    step = NEWEST if program.newest else call.step
    call.state.store.drop(key, step)
    output = Output.of(value)
    if not output.tensors:  # a type whose tensors cannot be found, so it cannot be rebuilt later
        call.state.lost[key, step] = notices.UNREADABLE
        return
    if not finite(call, "non-finite-output", output.tensors):
        call.state.lost[key, step] = notices.NON_FINITE_ANCHOR
        return
    call.state.lost.pop((key, step), None)
    x, pairing = inputs.main, None
    if program.reads_x:
        root = site == "model"
        if (
            root
            and call.denoiser not in call.state.sample_slots
            and len(inputs.main) == 1
            and call.step in program.keeps_x
        ):
            (given,) = inputs.main
            if given.shape == output.tensors[0].shape:  # no channels but the sample's
                call.state.sample_slots[call.denoiser] = find_sample(given, given)
            else:
                call.state.unmatched_inputs[call.denoiser] = given
        sample_slot = call.state.sample_slots.get(call.denoiser) if root else None
        call.state.pairings[key] = pairing = pair(
            inputs, output.tensors, flow or {}, root=root, sample_slot=sample_slot
        )
        x = pairing.x(inputs)
    packer = call.state.packer(call.denoiser, site, output.tensors[0].device)
    kept_x: tuple[Kept, ...] = ()
    differs = call.step in program.differences
    own = own_inputs(output.tensors, x, pairing, packer.how) if differs else None
    if own is not None:
        kept = tuple(packer.keep_difference(f, x_f) for f, x_f in zip(output.tensors, own, strict=True))
    else:
        kept = tuple(packer.keep(t) for t in output.tensors)
        kept_x = tuple(packer.keep(t, mine=True) for t in x) if call.step in program.keeps_x else ()
    anchor = Anchor(output.form(), kept, kept_x, store.signature(x), difference=own is not None)
    call.state.store.put(key, step, anchor)


def own_inputs(
    outputs: Sequence[Tensor], x: Sequence[Tensor], pairing: Pairing | None, how: Format | None
) -> list[Tensor] | None:
    """Return the inputs whose differences from the outputs are kept in place of the outputs.

    Args:
        outputs: The tensors of the site's output.
        x: The tensors of its input.
        pairing: Which input belongs to which output, or None if the plan does not need inputs.
        how: The format in which outputs are kept.

    Returns:
        One input for every output, or None if outputs are kept as they are.
    """
    if pairing is None or pairing.unclear or not all(store.fewer_bytes(f, how) for f in outputs):
        return None
    own = [x[i] for i in pairing.own if i is not None]
    fits = len(own) == len(outputs) and all(t.shape == f.shape for t, f in zip(own, outputs, strict=True))
    return own if fits else None
