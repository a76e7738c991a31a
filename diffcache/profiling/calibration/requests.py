"""Check the arguments of ``optimize`` before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffcache import host, planning
from diffcache.documents.budget import Budget, check_seconds
from diffcache.documents.schedule import check_store
from diffcache.errors import BadOption
from diffcache.profiling.measuring.estimating import estimate
from diffcache.profiling.recording.measured_sites import granularities

Calls = Sequence[Mapping[str, Any]]


def check_request(
    pipe: Any,
    calls: Calls,
    held_out: Calls | None,
    budget: Budget,
    *,
    scheduler: str,
    time_limit_s: float | None,
    sites: str,
    store: str | None,
) -> None:
    """Raise unless :func:`diffcache.optimize` can fulfil the request with these arguments.

    Nothing runs, unless the budget limits memory: then the first step of the first call runs, to find the size of an
    output.

    Raises:
        BadOption, UnknownName: An argument has no value that can be met.
    """
    inside = granularities(sites)[-1] != "model"
    repeatable = inside or store is not None  # only then do the calls run more than once
    host.check_calls(pipe, calls, repeatable=repeatable)
    if held_out:
        host.check_calls(pipe, held_out, "held_out", repeatable=repeatable)
    host.check_same_steps(pipe, [*calls, *(held_out or ())], "calls and held_out" if held_out else "calls")
    check_method(budget, scheduler=scheduler, sites=sites, store=store)
    check_seconds("time_limit_s", time_limit_s)
    steps = host.iterations(pipe, calls[0])
    budget.check(steps, whole=not inside and scheduler == "search")
    if budget.memory_bytes is not None and not inside:
        _check_memory(pipe, calls[0], budget.memory_bytes)


def _check_memory(pipe: Any, call: Mapping[str, Any], most: int) -> None:
    least = estimate(pipe, f"uniform:every={host.MOST_STEPS}", **call).cache_bytes
    if least > most:
        raise BadOption("memory_bytes", most, f"{least} or more: one step's outputs, of this batch")


def check_method(budget: Budget, *, scheduler: str, sites: str, store: str | None) -> None:
    """Raise unless there is such a scheduler, and the format of kept outputs fits the sites. This needs no pipeline.

    Raises:
        BadOption, UnknownName: An argument has no value that can be met.
    """
    if scheduler != "search":
        planning.check_scheduler(scheduler)
    if granularities(sites)[-1] != "model":
        planning.check_store(store, budget)
    elif store is not None:
        check_store(store)
