"""Schedules whose rules decide in the run, and what such a run of a tiny pipeline gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from pipelines import TINY, run, shared
from probes import hold
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerated, report
from diffcache.documents import DenoiserPlan, Guidance, Online, SitePlan
from diffcache.executor import Report
from diffcache.host import find_sites, main_of

STEPS = 12
RULES: tuple[str, ...] = ("first_block", "modulated_input", "output_rate", "drift")
INSIDE = ("first_block", "modulated_input", "time_embedding")
HUGE = 1e9


def residual(compute: Sequence[bool] | str) -> SitePlan:
    """F of the newest computed step, moved along with the input."""
    plan = hold(compute)
    return SitePlan(compute=plan.compute, weights=plan.weights, kappa=plan.weights[:, :, 0])


def stacks(pipe: Any) -> list[str]:
    return [site for site in find_sites(pipe.transformer) if site.startswith("stack:")]


def decided(
    pipe: Any,
    rule: str,
    limit: float | Sequence[float] = HUGE,
    *,
    plan: SitePlan | None = None,
    guidance: Guidance | None = None,
    sites: Sequence[str] | None = None,
    **options: Any,
) -> CacheSchedule:
    """Everything but the first step is left to the run, unless ``plan`` says otherwise."""
    plan = plan or residual("#" + "." * (STEPS - 1))
    limits = np.broadcast_to(np.asarray(limit, float), len(plan.compute)).copy()
    if sites is None:
        sites = stacks(pipe) if rule in INSIDE else ["model"]
    rules = Online(rule=rule, limit=limits, **options)
    denoiser = DenoiserPlan(sites=dict.fromkeys(sites, plan), online=rules)
    return CacheSchedule(steps=len(plan.compute), denoisers={"transformer": denoiser}, guidance=guidance)


def toy_schedule(rule: str, limit: float = HUGE, sites: Sequence[str] = (), steps: int = 8) -> CacheSchedule:
    sites = sites or (["stack:blocks"] if rule in INSIDE else ["model"])
    plan = residual("#" + "." * (steps - 1))
    rules = Online(rule=rule, limit=np.full(steps, limit))
    denoiser = DenoiserPlan(sites=dict.fromkeys(sites, plan), online=rules)
    return CacheSchedule(steps=steps, denoisers={"transformer": denoiser})


def played(name: str, schedule: Any, **call: Any) -> tuple[Tensor, Report]:
    """The output and the report of one run of a tiny pipeline."""
    pipe = shared(name)
    with accelerated(pipe, schedule):
        output = run(pipe, TINY[name].call(pipe), num_inference_steps=STEPS, **call)
        return output, report(pipe)


def plain(name: str, **call: Any) -> Tensor:
    return run(shared(name), TINY[name].call(shared(name)), num_inference_steps=STEPS, **call)


def strips(found: Report, site: str) -> list[str]:
    """One per branch."""
    return [row.strip for row in found.rows if row.site == site]


def governed(pipe: Any, rule: str) -> str:
    return stacks(pipe)[0] if rule in INSIDE else "model"


@contextmanager
def denoised(module: nn.Module) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Input and output of every call, predicted ones included."""
    main, found = main_of(module), []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((main(args, kwargs).double().numpy().copy(), output[0].double().numpy().copy()))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def mean(x: np.ndarray) -> float:
    return float(np.abs(x).mean())
