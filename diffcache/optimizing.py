"""From a pipeline and a few calls to the best schedule that a budget allows, at whatever sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffcache import host, planning
from diffcache.api import accelerated
from diffcache.budget import Budget
from diffcache.correction import correct
from diffcache.patch import layer
from diffcache.profiling import Calibration, measure
from diffcache.profiling.fit import Fit, psnr_db
from diffcache.profiling.record import frozen
from diffcache.schedule import CacheSchedule, Expected, decibels
from diffcache.store import Output

Calls = Sequence[Mapping[str, Any]]


def optimize(
    pipe: Any,
    calls: Calls,
    budget: Budget | float,
    *,
    scheduler: str = "search",
    held_out: Calls | None = None,
    time_limit_s: float | None = None,
    sites: str = "model",
    store: str | None = None,
    progress: bool = False,
) -> CacheSchedule:
    """Measure ``pipe`` on ``calls`` (arguments for ``pipe(**call)``, 16 prompts or more in all) and return the best
    schedule found within ``budget`` (a :class:`Budget`, or a number of computed steps).

    scheduler     "search": at the whole denoiser, moves of computed steps, each fitted and scored on the final state;
                  at inner sites, "allocate". Or a scheduler by name or spec, whose decisions are taken as they are
                  and fitted
    held_out      calls that candidates are accepted by; None: every fourth of ``calls``, if there are several
    time_limit_s  for the search; None: a fixed number of fits, which makes the schedule the same every time
    sites         "model", the whole denoiser, or "stack", "block", "sublayer" inside
    store         format in which outputs are kept: "bf16", "int8", "fp8", "int4"; at inner sites "auto" as well: for
                  each the one with which all fit into the budget's ``memory_bytes``. None: as they are
    progress      show bars: of calls, and of fits with what each reached

    Calls run once, in full; then parts of their loops are repeated: the search at the model site fits each candidate to
    the full run's states. At inner sites the calls run twice more, to correct what is predicted, channel by channel.
    There, and with ``store``, what fidelity to expect is seen by running the calls once more, with and without.
    Generators in the calls are left where they were found. The schedule says what fidelity to expect, and at the model
    site what budgets nearby would have given ("front").

    Raises UnsupportedModel, AlreadyAccelerated, BadOption, UnknownName.
    """
    pipe = host.adopted(pipe)
    if sites == "model":
        total = len(calls) + len(held_out or ())
        with tqdm(total=total, desc="record", unit="call", disable=not progress) as bar:
            calibration = Calibration.record(pipe, calls, bar.update, held_out=held_out or ())
        with tqdm(desc="fit", unit="fit", disable=not progress) as bar:

            def tried(found: Fit) -> None:
                bar.set_postfix_str(f"{found.compute.sum()} steps {decibels(found.held_score)}", refresh=False)
                bar.update()

            schedule = calibration.schedule(
                budget, scheduler=scheduler, time_limit_s=time_limit_s, store=store, tried=tried
            )
        return schedule if store is None else _promising(pipe, schedule.stored(store), calls, held_out)
    profile = measure(pipe, calls, sites=("model", sites), progress=progress)
    name = "allocate" if scheduler == "search" else scheduler
    schedule = correct(pipe, planning.plan(profile, name, budget, store=store, sites=sites), calls)
    return _promising(pipe, schedule, calls, held_out)


def _promising(pipe: Any, schedule: CacheSchedule, calls: Calls, held_out: Calls | None) -> CacheSchedule:
    """``schedule`` with the fidelity that it is seen to have."""
    judged, origin = (held_out, "held-out") if held_out else (calls, "calibration")
    full = final_states(pipe, judged)
    with accelerated(pipe, schedule):
        ends = final_states(pipe, judged)
    psnr = torch.cat([psnr_db(end, reference) for end, reference in zip(ends, full, strict=True)]).numpy()
    return dataclasses.replace(schedule, expected=Expected.over(psnr, origin))  # type: ignore[arg-type]


def final_states(pipe: Any, calls: Calls) -> list[Tensor]:
    """What the last ``scheduler.step`` of each call returned, or the call, where nobody steps a noise scheduler;
    generators are left where they were found."""
    ends = []
    for call in calls:
        states: list[Tensor] = []

        def step(inner: Callable[..., Any], *args: Any, states: list[Tensor] = states, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            states[:] = [Output.of(value).tensors[0]]
            return value

        with ExitStack() as undo, torch.no_grad():
            undo.callback(layer(pipe.scheduler, "step", step, copies=True))
            result = pipe(**{name: frozen(value) for name, value in call.items()})
        ends.append(states[0] if states else Output.of(result).tensors[0])
    return ends
