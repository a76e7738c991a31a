"""Find the best schedule within a budget, from a pipeline and a few calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcache import host, planning
from diffcache.api import accelerated
from diffcache.documents.budget import Budget
from diffcache.documents.schedule import CacheSchedule, Expected
from diffcache.documents.token_profile import TokenProfile
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import Unusable
from diffcache.profiling.calibration.calibration import Calibration
from diffcache.profiling.calibration.correction import correct
from diffcache.profiling.calibration.fit_bar import FitBar
from diffcache.profiling.calibration.requests import check_request
from diffcache.profiling.calibration.token_search import DecodingCalibration
from diffcache.profiling.fitting import psnr_db
from diffcache.profiling.fitting.promise import JUDGING_SHARE
from diffcache.profiling.measuring.measure import measure
from diffcache.profiling.measuring.token_measure import demand_loop
from diffcache.profiling.recording.states import final_states
from diffcache.settings import shows_progress

Calls = Sequence[Mapping[str, Any]]
Asked = str | Mapping[str, Any] | Sequence[str] | Calls


def optimize(
    pipe: Any,
    calls: Asked,
    budget: Budget | float,
    *,
    scheduler: str = "search",
    held_out: Asked | None = None,
    time_limit_s: float | None = None,
    sites: str = "model",
    store: str | None = None,
    progress: bool | None = None,
    **common: Any,
) -> CacheSchedule | TokenSchedule:
    """Measure ``pipe`` on ``calls`` and return the best schedule found within ``budget``.

    Calls run once, in full; then parts of their loops are repeated: at the model site, the search fits each candidate
    to the full run's states. At inner sites the calls run twice more, to correct what is predicted, channel by channel.
    Generators in the calls are left where they were found.

    What fidelity to expect (``schedule.expected``) comes from samples that neither fitted nor accepted anything: a
    quarter of all samples is kept apart for it, and batches are split. With few samples it says how few, and its spread
    is wider. The final coefficients are then fitted to all samples.

    Args:
        pipe: A pipeline, a policy or a :class:`diffcache.Loop`, not accelerated.
        calls: Prompts, or dictionaries of arguments for ``pipe(**call)``: one, or a list. 16 prompts or more in all.
            The prompts get the seeds 0, 1, … A dictionary without a generator draws from torch's global generator: call
            ``torch.manual_seed`` before, or two optimisations differ.
        budget: A :class:`diffcache.Budget`, or a number of computed steps.
        scheduler: "search": at the whole denoiser, moves of computed steps, each fitted and scored on the final state;
            at inner sites, "allocate". Or a scheduler by name or spec. Its decisions are fitted as they are.
        held_out: Calls that no coefficient is fitted to: one half of their samples accepts candidates, the other half
            gives ``expected``. Prompts get the seeds that follow those of ``calls``. None: the samples of ``calls`` are
            split.
        time_limit_s: Seconds for everything that follows the recording of the calls. The fits of the evenly spread mask
            and of the simulated plan are made in any case, and so are the last fits, of the promise and of the final
            coefficients. None: a fixed number of fits, which makes the schedule the same every time. At the model site.
        sites: "model", the whole denoiser, or "stack", "block", "sublayer" inside.
        store: Format in which outputs are kept: "bf16", "int8", "fp8", "int4"; at inner sites "auto" as well: for each
            the one with which all fit into the budget's ``memory_bytes``. None: as they are. What it costs is seen by
            running the calls again, which a time limit does not count.
        progress: Whether to show bars: of calls, and of fits with the best so far and what comes next. None: on a
            terminal or in a notebook.
        **common: Arguments of the pipeline that are added to every call, such as ``num_inference_steps=28``.

    Returns:
        The schedule. At the model site it names what budgets nearby gave ("front"), how many fits were made and whether
        the search was cut short. No fit of as many or fewer computed steps that the search saw scored higher.

    Raises:
        UnsupportedModel, AlreadyAccelerated, BadOption, UnknownName.

    Example:
        >>> prompts = ["a cat", "a dog", "a harbour at dawn", ...]
        >>> schedule = diffcache.optimize(pipe, prompts, 10, num_inference_steps=28, guidance_scale=3.5)
        >>> schedule.save("schedule.safetensors")
    """
    progress = shows_progress(progress)
    pipe = host.adopted(pipe)
    if host.language_model_of(pipe) is not None:
        given = {"scheduler": scheduler != "search", "time_limit_s": time_limit_s is not None}
        _demand_left_out(given | {"sites": sites != "model", "store": store is not None})
        return _of_language_model(pipe, calls, Budget.of(budget), held_out, common, progress)
    host.demand_full_run(pipe)
    host.denoisers(pipe)
    calls = host.calls_of(pipe, calls, common, optimize)
    apart: Calls | None = None
    if held_out is not None:
        apart = host.calls_of(pipe, held_out, common, optimize, "held_out", first_seed=len(calls)) if held_out else ()
    budget = Budget.of(budget)
    check_request(pipe, calls, apart, budget, scheduler=scheduler, time_limit_s=time_limit_s, sites=sites, store=store)
    if sites != "model":
        if time_limit_s is not None:
            raise Unusable("time_limit_s", f"sites={sites!r} needs no search", "Leave out time_limit_s")
        return _at_inner_sites(pipe, calls, budget, scheduler, apart, sites, store, progress)
    total = len(calls) + len(apart or ())
    with tqdm(total=total, desc="record", unit="call", disable=not progress) as bar:
        calibration = Calibration.record(pipe, calls, bar.update, held_out=apart or ())
    with FitBar(budget, searches=scheduler == "search", disable=not progress) as fits:
        schedule = calibration.schedule(
            budget, scheduler=scheduler, time_limit_s=time_limit_s, store=store, tried=fits.tried, began=fits.began
        )
    kept = schedule if store is None else schedule.stored(store)
    if schedule.expected is None or kept == schedule:
        return kept
    exact, coarse = _psnr_db(pipe, (schedule, kept), [*calls, *(apart or ())])
    return dataclasses.replace(kept, expected=_lowered(schedule.expected, float(exact.mean() - coarse.mean())))


def _at_inner_sites(
    pipe: Any,
    calls: Calls,
    budget: Budget | float,
    scheduler: str,
    held_out: Calls | None,
    sites: str,
    store: str | None,
    progress: bool,
) -> CacheSchedule:
    apart = max(1, len(calls) // JUDGING_SHARE) if held_out is None and len(calls) > 1 else 0
    fitting, judging = calls[: len(calls) - apart], held_out or calls[len(calls) - apart :] or calls
    profile = measure(pipe, fitting, sites=("model", sites), progress=progress)
    if isinstance(profile, TokenProfile):
        raise Unusable("sites", "a language model has none", "Leave out sites")
    name = "allocate" if scheduler == "search" else scheduler
    planned = planning.plan(profile, name, budget, store=store, sites=sites)
    schedule = correct(pipe, planned, fitting)
    (found,) = _psnr_db(pipe, (schedule,), judging)
    expected = Expected.over(found, "calibration" if judging is calls else "held-out")
    if apart:
        schedule = correct(pipe, planned, calls)
    return dataclasses.replace(schedule, expected=expected)


def _lowered(expected: Expected, cost_db: float) -> Expected:
    """Return the promise, less ``cost_db``: what a format is seen to cost."""
    ends = {name: getattr(expected, name) - cost_db for name in ("mean_db", "low_db", "high_db")}
    return dataclasses.replace(expected, **ends)


def _psnr_db(pipe: Any, schedules: Sequence[CacheSchedule], calls: Calls) -> list[np.ndarray]:
    """Return the fidelity that each schedule shows on ``calls``.

    Returns:
        One PSNR in dB per sample for each schedule, float64 [N]; where the state holds every sample once for each
        branch, [2N].
    """
    full = final_states(pipe, calls)
    found = []
    for schedule in schedules:
        with accelerated(pipe, schedule):
            ends = final_states(pipe, calls)
        pairs = zip(ends, full, strict=True)
        found.append(torch.cat([psnr_db(end, reference) for end, reference in pairs]).numpy())
    return found


def _demand_left_out(given: Mapping[str, bool]) -> None:
    """Raise Unusable for the first option that was given, name -> whether it was."""
    for name in (name for name, is_given in given.items() if is_given):
        next_step = "Pass store to accelerate" if name == "store" else f"Leave out {name}"
        raise Unusable(name, "it does not apply to the calibration of a language model", next_step)


def _of_language_model(
    pipe: Any, calls: Asked, budget: Budget, held_out: Asked | None, common: Mapping[str, Any], progress: bool
) -> TokenSchedule:
    """Return the best token schedule for a loop around a language model."""
    demand_loop(pipe)
    host.demand_full_run(pipe)
    made = host.calls_of(pipe, calls, common, optimize)
    apart = None if held_out is None else host.calls_of(pipe, held_out, common, optimize, "held_out")
    for name, given in (("calls", made), ("held_out", apart or made)):
        host.check_calls(pipe, given, name, repeatable=False)
    calibration = DecodingCalibration.record(pipe, made, held_out=apart, progress=progress)
    return calibration.schedule(budget, progress=progress)
