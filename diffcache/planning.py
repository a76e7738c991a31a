"""From a profile and a budget to a schedule, by any scheduler of the room: what they all share."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffcache import _rooms, schedulers
from diffcache.budget import Budget
from diffcache.errors import BadOption
from diffcache.profile import DenoiserProfile, Profile
from diffcache.schedule import CacheSchedule, DenoiserPlan, Expected, SitePlan
from diffcache.schedulers import Planned
from diffcache.schedulers._simulation import Simulator


@dataclass(frozen=True, slots=True)
class Scheduler:
    """One line of ``diffcache plan --list``. ``options``: name -> default."""

    name: str
    summary: str
    source: str
    options: dict[str, Any]


def available() -> tuple[Scheduler, ...]:
    """Every scheduler that plans from a profile."""
    return tuple(map(_described, schedulers.having("plan")))


def plan(profile: Profile, scheduler: str, budget: Budget | float, **options: Any) -> CacheSchedule:
    """The schedule that ``scheduler`` makes of ``profile`` within ``budget`` (a bare number: computed steps).

    scheduler  a name of :func:`available`, or a spec with options, ``"path:gamma=4"``

    No network is called. Raises UnknownName, BadOption; an impossible budget is a BadOption that says what is possible.
    """
    budget = Budget.of(budget)
    name, given = schedulers.parse_spec(scheduler, "plan")
    options = given | options
    make = schedulers.function(name, "plan", options)
    _only_denoiser(profile)

    def planned(computed_steps: float) -> Planned:
        found: Planned = make(profile, computed_steps, **options)
        return found

    if budget.computed_steps is not None:
        found = planned(_steps(profile, budget.computed_steps))
    elif budget.speedup is not None:
        found = planned(steps_for_speedup(profile, budget.speedup))
    else:
        assert budget.max_error_db is not None
        found = _cheapest(profile, planned, budget.max_error_db)
    if budget.memory_bytes is not None:
        _demand_memory(profile, found, budget.memory_bytes)
    return document(profile, found, {"scheduler": _spec(name, options), "budget": str(budget)})


def document(profile: Profile, planned: Planned, notes: dict[str, str]) -> CacheSchedule:
    """The schedule of these decisions, in the circumstances of the profile."""
    name, denoiser = _only_denoiser(profile)
    before = profile.start  # a loop that starts late never enters the steps before; they count as computed
    return CacheSchedule(
        steps=before + profile.steps,
        denoisers={
            name: DenoiserPlan(
                sites={site: _begun_late(plan, before) for site, plan in planned.sites.items()},
                online=planned.online,
                class_name=denoiser.class_name,
                config_digest=denoiser.config_digest,
            )
        },
        noise_scheduler=profile.noise_scheduler,
        guidance=profile.guidance,
        timesteps=None if before else profile.timesteps,
        sigmas=planned.sigmas,
        expected=planned.expected or expected(profile, planned),
        provenance={**planned.notes, **notes, "profile": profile.digest()},
    )


def expected(profile: Profile, planned: Planned) -> Expected | None:
    """What the simulation of a plan ends at; None where the profile or the plan does not allow one."""
    if profile.dynamics is None or planned.online or planned.sigmas is not None or set(planned.sites) != {"model"}:
        return None
    simulator = Simulator(profile.dynamics)
    run = simulator.played(planned.sites["model"])
    return None if run is None else Expected.over(simulator.psnr_db(run), "simulated")


def cache_bytes(profile: Profile, planned: Planned) -> int:
    """Most bytes of kept outputs at one time, for the batch that was profiled; inputs that drift terms need included."""
    _, denoiser = _only_denoiser(profile)
    total = 0
    for site, plan in planned.sites.items():
        held = denoiser.sites[site].output_bytes * denoiser.sites[site].calls
        total += held * (plan.anchors + (plan.kappa is not None and bool(plan.kappa.any())))
    return total


def steps_for_speedup(profile: Profile, speedup: float) -> float:
    """How many computed steps the loop may have, by the profile's clock: what is not the denoiser stays."""
    _, denoiser = _only_denoiser(profile)
    root = denoiser.sites.get("model")
    if root is None or not root.seconds or not profile.seconds:
        raise BadOption("speedup", speedup, "a budget in computed_steps: this profile measured no seconds of the loop")
    step = root.seconds * root.calls
    rest = max(profile.seconds - step * profile.steps, 0.0)
    computed = math.floor((profile.seconds / speedup - rest) / step + 1e-9)
    if computed < 1:
        best = profile.seconds / (rest + step)
        raise BadOption("speedup", speedup, f"up to {best:.2f}, with one computed step of {profile.steps}")
    return min(computed, profile.steps)


def _steps(profile: Profile, computed_steps: float) -> float:
    if not 1 <= computed_steps <= profile.steps:
        raise BadOption("computed_steps", computed_steps, f"1 to {profile.steps}, the steps of the profile")
    whole = int(computed_steps)
    return whole if whole == computed_steps else computed_steps


def _cheapest(profile: Profile, planned: Any, least_db: float) -> Planned:
    """The plan of fewest computed steps that is expected to be good enough; error falls as steps are added."""
    best: Planned | None = None
    low, high = 1, profile.steps
    while low <= high:
        middle = (low + high) // 2
        found: Planned = planned(middle)
        seen = found.expected or expected(profile, found)
        if seen is None:
            raise BadOption(
                "max_error_db", least_db, "a budget in computed_steps: what this plan would end at cannot be simulated"
            )
        if seen.mean_db >= least_db:
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise BadOption("max_error_db", least_db, f"up to {seen.mean_db:.1f}, at {profile.steps} computed steps")
    return best


def _demand_memory(profile: Profile, planned: Planned, most: int) -> None:
    if (needed := cache_bytes(profile, planned)) > most:
        raise BadOption(
            "memory_bytes", most, f"{needed} or more, which this plan keeps; fewer anchors, or coarser sites, keep less"
        )


def _only_denoiser(profile: Profile) -> tuple[str, DenoiserProfile]:
    if len(profile.denoisers) != 1:
        raise BadOption("profile", f"one of {', '.join(profile.denoisers)}", "a profile of one denoiser")
    ((name, denoiser),) = profile.denoisers.items()
    return name, denoiser


def _begun_late(plan: SitePlan, before: int) -> SitePlan:
    if not before:
        return plan

    def later(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.pad(array, [(0, 0), (before, 0), *[(0, 0)] * (array.ndim - 2)])

    return SitePlan(
        compute=np.concatenate([np.ones(before, bool), plan.compute]),
        weights=np.pad(plan.weights, ((0, 0), (before, 0), (0, 0))),
        kappa=later(plan.kappa),
        scale=later(plan.scale),
        bias=later(plan.bias),
    )


def _described(name: str) -> Scheduler:
    module = _rooms.load(schedulers.__name__, name)
    parameters = inspect.signature(module.plan).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    summary = (module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return Scheduler(name, summary, module.SOURCE, options)


def _spec(name: str, options: dict[str, Any]) -> str:
    return name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")
