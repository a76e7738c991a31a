"""Accelerate a pipeline, restore it, report on its runs, estimate what a schedule saves."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import AcceleratedObjectCopied, AlreadyAccelerated, BadOption
from diffcache.executor import Executor, Misfit
from diffcache.executor.cost import Estimate, estimate_for
from diffcache.executor.report import Report, report_of
from diffcache.host.structure import find_sites
from diffcache.kernels.library import Backend
from diffcache.patch import refusal
from diffcache.schedulers import Rule, is_rule, parse_rule, rules

P = TypeVar("P")


class _Mark:
    """Sits in the pipeline's ``__dict__`` while it is accelerated, and refuses copies that would share its layers."""

    def __init__(self, executor: Executor, pipe: Any) -> None:
        self.executor = executor
        self.pipe_class = type(pipe).__name__
        # A pipeline that is dropped may leave its denoiser to another one: without our layers.
        self.dropped = weakref.finalize(pipe, executor.detach)
        self.dropped.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        raise AcceleratedObjectCopied(refusal(self.pipe_class, "deep copy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AcceleratedObjectCopied(refusal(self.pipe_class, "pickle"))


def accelerate(
    pipe: P,
    schedule: CacheSchedule | Rule | str | Path,
    *,
    strict: bool = True,
    store: str | None = None,
    backend: Backend = "auto",
    mismatch: Misfit = "refuse",
) -> P:
    """Let ``pipe`` skip the denoiser work that ``schedule`` predicts instead. In place; returns the same pipeline.

    pipe      a diffusers pipeline; a diffusion policy of a known family (docs/policies.md); or the network of a
              loop of your own, around which :func:`trajectory` then has to stand
    schedule  a :class:`CacheSchedule`, the path of one, a hub id, or a rule that needs no calibration: ``"full"``,
              ``"uniform:every=3"``, ``"taylorseer:every=4,order=1"``; ``sites=block`` in a rule applies it per block
    strict    also compare configuration digests of the denoiser and the noise scheduler; False only for fine-tunes
    store     format in which all kept outputs lie: "bf16", "int8", "fp8", "int4"; "exact": as they are, in the model's
              own precision; None: as the schedule says
    backend   what works on them: "auto" (Triton kernels on a GPU, else plain torch), "torch", "compiled" (plain torch
              through ``torch.compile``), "triton"
    mismatch  what becomes of a run that does not fit the schedule (another number of steps, noise scheduler or
              guidance): "refuse" raises ScheduleMismatch, at the latest in the second step; "full" computes the run in
              full, bit for bit as without diffcache, counts it in :func:`report` and logs why

    Only this object is patched; :func:`restore` leaves no trace, in any order with other patches. With every step
    computed the output is bit-identical to the untouched pipeline's. What a run does otherwise than its schedule says
    is counted in :func:`report`, logged by the logger ``diffcache``, and a ``FailedOpen`` warning (docs/serving.md).

    Raises UnsupportedModel, ScheduleMismatch, AlreadyAccelerated, DocumentError, UnknownName; nothing is patched then.
    """
    loop = host.adopted(pipe, bare=True)
    modules = host.denoisers(loop)
    if host.MARK in loop.__dict__:
        current = loop.__dict__[host.MARK].executor.source
        raise AlreadyAccelerated(
            f"this {type(loop).__name__} is accelerated already, by {_title(current)}. "
            "Call diffcache.restore(pipe) first, then accelerate it anew."
        )
    host.demand_no_other_cache(loop)
    source = resolve(schedule)
    sites = {name: find_sites(m) for name, m in modules.items()}
    executor = Executor(loop, source, sites, strict=strict, store=store, backend=backend, mismatch=mismatch)
    executor.attach()
    loop.__dict__[host.MARK] = _Mark(executor, loop)
    return pipe


def restore(pipe: P) -> P:
    """Undo :func:`accelerate` and return the same pipeline. A pipeline that is not accelerated stays as it is.

    Raises:
        UnsupportedModel: ``pipe`` is no object that can be accelerated.
    """
    mark = getattr(host.adopted(pipe, bare=True), "__dict__", {}).pop(host.MARK, None)
    if mark is not None:
        mark.dropped()  # the same, once
    elif not hasattr(host.adopted(pipe, bare=True), "components"):
        host.denoisers(pipe)  # raises: nothing like this can be accelerated
    return pipe


@contextmanager
def accelerated(
    pipe: P,
    schedule: CacheSchedule | Rule | str | Path,
    *,
    strict: bool = True,
    store: str | None = None,
    backend: Backend = "auto",
    mismatch: Misfit = "refuse",
) -> Iterator[P]:
    """:func:`accelerate` for the length of a ``with`` block."""
    accelerate(pipe, schedule, strict=strict, store=store, backend=backend, mismatch=mismatch)
    try:
        yield pipe
    finally:
        restore(pipe)


def report(pipe: Any) -> Report:
    """What the last (or current) run of an accelerated pipeline did: prints as a small table.

    Raises BadOption for a pipeline that is not accelerated.
    """
    return report_of(executor_of(pipe))


def estimate(
    pipe: Any, schedule: CacheSchedule | Rule | str | Path, *, store: str | None = None, **call: Any
) -> Estimate:
    """Return what ``schedule`` will save and cost in ``pipe(**call)``: runs its first step only, and leaves no trace.

    store  as of :func:`accelerate`

    Where a rule decides in the run, what it will save is known within limits only. The first steps that it decides
    about, up to 12, are run to see whether it skips any; not on a pipeline that is accelerated.

    Works on accelerated pipelines too. Raises what :func:`accelerate` raises.
    """
    look = host.MARK not in getattr(host.adopted(pipe, bare=True), "__dict__", {})
    return estimate_for(host.adopted(pipe), resolve(schedule), call, store, look=look)


def executor_of(pipe: Any) -> Executor:
    mark = getattr(host.adopted(pipe, bare=True), "__dict__", {}).get(host.MARK)
    if mark is None:
        raise BadOption("pipe", type(pipe).__name__, "a pipeline that diffcache.accelerate returned")
    return mark.executor  # type: ignore[no-any-return]


def resolve(schedule: CacheSchedule | Rule | str | Path) -> CacheSchedule | Rule:
    """A schedule, or a rule that makes one, from whatever the user named."""
    if isinstance(schedule, (CacheSchedule, Rule)):
        return schedule
    if not isinstance(schedule, (str, Path)):
        raise BadOption("schedule", schedule, f"a CacheSchedule, a path, a hub id, or a rule ({', '.join(rules())})")
    if isinstance(schedule, Path) or schedule.endswith(".safetensors") or os.path.isfile(schedule):  # noqa: PTH113
        return CacheSchedule.load(schedule)  # (Path.is_file raises for a name that is too long)
    if is_rule(schedule):
        return parse_rule(schedule)
    if "/" in schedule or os.path.isdir(schedule):  # noqa: PTH112
        return CacheSchedule.from_pretrained(schedule)
    return parse_rule(schedule)  # says which rules there are


def _title(source: CacheSchedule | Rule) -> str:
    if isinstance(source, Rule):
        return f"the rule {str(source)!r}"
    return f"a schedule of {source.steps} steps ({source.provenance.get('scheduler', 'hand-made')})"
