"""Plan a schedule from a profile and a budget, with any scheduler."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import numpy as np

from diffcache import schedulers
from diffcache.documents.budget import Budget
from diffcache.documents.context import Network, ScheduleContext
from diffcache.documents.document import configurations
from diffcache.documents.profile import DenoiserProfile, Profile
from diffcache.documents.schedule import CacheSchedule, Expected, Online, StoreFormat, most_db
from diffcache.errors import BadOption, DocumentError, Unusable
from diffcache.planning.storage import bytes_held, fit_formats
from diffcache.schedulers import Planned
from diffcache.simulation.simulator import Simulator


@dataclass(frozen=True, slots=True)
class Compared:
    """The schedule of one scheduler for a profile and a budget, or the reason why there is none."""

    name: str
    schedule: CacheSchedule | None
    reason: str = ""


def compare(profile: Profile, budget: Budget | float) -> list[Compared]:
    """Plan with every scheduler, each with its default options.

    Args:
        profile: The profile to plan from.
        budget: A budget, or a number of computed steps.

    Returns:
        One entry per scheduler. Schedules that expect a fidelity come first, the highest PSNR at the top; then
        schedules without a simulated final state; then schedulers that cannot plan from this profile.
    """
    found = []
    for name in schedulers.having("plan"):
        try:
            found.append(Compared(name, plan(profile, name, budget)))
        except (BadOption, DocumentError) as error:
            found.append(Compared(name, None, str(error)))

    def rank(one: Compared) -> tuple[int, float, str]:
        expected = one.schedule.expected if one.schedule is not None else None
        return (one.schedule is None, 0.0, one.name) if expected is None else (-1, -expected.mean_db, one.name)

    return sorted(found, key=rank)


def plan(
    profile: Profile,
    scheduler: str,
    budget: Budget | float,
    *,
    store: str | None = None,
    prescale: bool = False,
    **options: Any,
) -> CacheSchedule:
    """Plan a schedule from a profile within a budget. No network is called.

    Args:
        profile: The profile to plan from.
        scheduler: A name of :func:`available`, or a spec with options, ``"meancache:gamma=4"``.
        budget: A budget, or a number of computed steps.
        store: The format in which outputs are kept: "bf16", "int8", "fp8" or "int4". "auto" chooses a format for each
            site, so that all fit into the budget's ``memory_bytes`` with the least error. None keeps outputs as they
            are. A simulated fidelity does not include the error of a format.
        prescale: Use centre and spread of channels from the profile instead of those of each tensor that is kept.
        options: Options of the scheduler.

    Raises:
        UnknownName: There is no such scheduler or option.
        BadOption: An option is out of range, or the budget is impossible. The error states what is possible.

    Example:
        >>> profile = diffcache.measure(pipe, prompts, num_inference_steps=28)
        >>> schedule = diffcache.plan(profile, "closed_loop", 10)
        >>> pipe = diffcache.accelerate(pipe, schedule)
    """
    budget = Budget.of(budget)
    name, options = schedulers.parse_spec(scheduler, "plan", options)
    make = schedulers.function(name, "plan", options)
    limit = _MemoryLimit(budget.memory_bytes, store, prescale)
    _demand_types(make, options)
    if not isinstance(profile, Profile):
        raise BadOption("profile", type(profile).__name__, "a Profile: Profile.load(path) reads one")
    _only_denoiser(profile)

    def planned(computed_steps: float) -> Planned:
        return _within_memory(profile, name, make, options, computed_steps, limit)

    if budget.computed_steps is not None:
        found = planned(_steps(profile, budget.computed_steps))
    elif budget.speedup is not None:
        found = planned(steps_for_speedup(profile, budget.speedup))
    else:
        assert budget.min_psnr_db is not None
        found = _cheapest(profile, planned, budget.min_psnr_db)
    return document(profile, found, {"budget": str(budget)})


def check_scheduler(scheduler: str) -> None:
    """Raise UnknownName or BadOption unless ``scheduler`` is a spec with known options of the right types."""
    name, options = schedulers.parse_spec(scheduler, "plan")
    _demand_types(schedulers.function(name, "plan", options), options)


def check_store(store: str | None, budget: Budget) -> None:
    """Raise BadOption unless ``store`` is a format. "auto" needs a budget that limits memory."""
    _MemoryLimit(budget.memory_bytes, store, prescale=False)


def document(profile: Profile, planned: Planned, notes: dict[str, str]) -> CacheSchedule:
    """Make the schedule of a plan, for the loop and the network of the profile.

    Args:
        profile: The profile that was planned from.
        planned: The plan.
        notes: Entries of the schedule's provenance.
    """
    name, _ = _only_denoiser(profile)
    around = profile.start, profile.after
    return _context(profile).schedule(
        {name: {site: plan.on_grid(*around) for site, plan in planned.sites.items()}},
        online=planned.online and _on_grid(planned.online, *around),
        sigmas=planned.sigmas,
        expected=planned.expected or expected(profile, planned),
        notes={**planned.notes, **notes},
    )


def _context(profile: Profile) -> ScheduleContext:
    """Return the loop and the network of a profile."""
    name, denoiser = _only_denoiser(profile)
    called = np.pad(np.ones(profile.steps, bool), (profile.start, profile.after))
    return ScheduleContext(
        steps=profile.grid_steps,
        networks={name: Network(denoiser.class_name, denoiser.config_digest, called)},
        noise_scheduler=profile.noise_scheduler,
        guidance=profile.guidance,
        timesteps=profile.timesteps if called.all() else None,
        notes={"profile": profile.digest(), **configurations(profile.provenance)},
    )


def expected(profile: Profile, planned: Planned) -> Expected | None:
    """Simulate a plan and return the fidelity at its end; None if the profile or the plan cannot be simulated."""
    if profile.dynamics is None or planned.online or planned.sigmas is not None or set(planned.sites) != {"model"}:
        return None
    simulator = Simulator(profile.dynamics)
    run = simulator.played(planned.sites["model"])
    return None if run is None else Expected.over(simulator.psnr_db(run), "simulated")


def cache_bytes(profile: Profile, planned: Planned, anchors: int | None = None) -> int:
    """Return the most bytes of kept tensors at one time, for the batch that was profiled.

    Kept tensors are outputs, and the inputs that κ and v need.

    Args:
        profile: The profile, with the sizes of outputs.
        planned: The plan.
        anchors: Count as if predictions used this number of newest outputs only.
    """
    _, denoiser = _only_denoiser(profile)
    held = np.zeros(profile.steps, np.int64)
    for name, plan in planned.sites.items():
        site = denoiser.sites[name]
        held += bytes_held(site, plan, anchors)
    return int(held.max())


def steps_for_speedup(profile: Profile, speedup: float) -> float:
    """Return how many steps the loop may compute to reach a speed-up, by the seconds in the profile.

    Raises:
        BadOption: The profile has no seconds, or one computed step is already too slow.
    """
    _, denoiser = _only_denoiser(profile)
    root = denoiser.sites.get("model")
    if root is None or not root.seconds or not profile.seconds:
        raise Unusable(
            "speedup", "this profile did not measure the seconds of the loop", "Pass a budget in computed_steps"
        )
    step = min(root.seconds * root.calls, profile.seconds / profile.steps)  # a median may exceed the mean
    rest = profile.seconds - step * profile.steps
    computed = math.floor((profile.seconds / speedup - rest) / step + 1e-9)
    if computed < 1:
        best = profile.seconds / (rest + step)
        raise BadOption("speedup", speedup, f"up to {best:.2f}, with one computed step of {profile.steps}")
    return min(computed, profile.steps)


def _steps(profile: Profile, computed_steps: float) -> float:
    """Return the budget, as an int if it is whole. Raise BadOption if it is out of range."""
    if not 1 <= computed_steps <= profile.steps:
        raise BadOption("computed_steps", computed_steps, f"1 to {profile.steps}, the steps of the profile")
    whole = int(computed_steps)
    return whole if whole == computed_steps else computed_steps


def _cheapest(profile: Profile, planned: Callable[[float], Planned], least_db: float) -> Planned:
    """Return the plan of fewest computed steps with at least ``least_db`` expected.

    All numbers of steps are tried in order, because fidelity does not always rise with them.
    """
    best, best_db = 0, -math.inf
    for computed_steps in range(1, profile.steps + 1):
        try:
            found = planned(computed_steps)
        except BadOption as error:
            if error.name != "computed_steps" or (computed_steps == profile.steps and not best):
                raise
            continue  # the scheduler needs more computed steps
        seen = found.expected or expected(profile, found)
        if seen is None:
            raise Unusable(
                "min_psnr_db", "the final state of this plan cannot be simulated", "Pass a budget in computed_steps"
            )
        if seen.mean_db >= least_db:
            return found
        if seen.mean_db > best_db:
            best, best_db = computed_steps, seen.mean_db
    raise BadOption("min_psnr_db", least_db, f"up to {most_db(best_db)}, at {best} computed steps")


@dataclass(frozen=True, slots=True)
class _MemoryLimit:
    """How the outputs of a plan are kept.

    Attributes:
        most: Most bytes at one time, or None.
        store: A format, "auto" or None.
        prescale: Whether centre and spread of channels come from the profile.
    """

    most: int | None
    store: str | None
    prescale: bool

    def __post_init__(self) -> None:
        allowed = (None, "auto", *get_args(StoreFormat))
        if self.store not in allowed:
            raise BadOption("store", self.store, ", ".join(map(repr, allowed)))
        if self.store == "auto" and self.most is None:
            raise Unusable(
                "store", "'auto' needs a memory limit", "Pass a budget with memory_bytes, or the name of a format"
            )

    def of(self, profile: Profile, found: Planned) -> tuple[Planned, bool]:
        """Return the plan with its formats, and whether it fits into memory.

        With "auto", a plan that does not fit is returned with the smallest format.
        """
        _, denoiser = _only_denoiser(profile)
        if self.store == "auto":
            assert self.most is not None
            chosen = fit_formats(profile, denoiser.sites, found, self.most)
            return chosen or _kept_in(found, "int4"), chosen is not None
        kept = found if self.store is None else _kept_in(found, self.store)
        return kept, self.most is None or cache_bytes(profile, kept) <= self.most

    def prescaled(self, profile: Profile, found: Planned) -> Planned:
        """Return the plan with centre and spread of channels from the profile if ``prescale`` is set."""
        if not self.prescale:
            return found
        _, denoiser = _only_denoiser(profile)
        sites = {
            name: dataclasses.replace(plan, prescale=denoiser.sites[name].channels) if plan.store else plan
            for name, plan in found.sites.items()
        }
        return dataclasses.replace(found, sites=sites)


def _kept_in(found: Planned, store: Any) -> Planned:
    """Return the plan with one format for all sites."""
    plans = {name: dataclasses.replace(plan, store=store) for name, plan in found.sites.items()}
    return dataclasses.replace(found, sites=plans)


def _within_memory(
    profile: Profile,
    name: str,
    make: Callable[..., Planned],
    options: dict[str, Any],
    computed_steps: float,
    limit: _MemoryLimit,
) -> Planned:
    """Return a plan that fits into memory, with fewer anchors than the options ask for if necessary.

    Its notes contain the options that it was made with.

    Raises:
        BadOption: No number of anchors fits.
    """
    most = limit.most
    while True:
        found, fits = limit.of(profile, make(profile, computed_steps, **options))
        if fits:
            notes = {**found.notes, "scheduler": _spec(name, options)}
            return dataclasses.replace(limit.prescaled(profile, found), notes=notes)
        assert most is not None
        needed = cache_bytes(profile, found)
        kept = max(plan.anchors for plan in found.sites.values())
        can_fewer = "anchors" in inspect.signature(make).parameters
        fewer = [n for n in range(1, kept) if can_fewer and cache_bytes(profile, found, n) <= most]
        if not fewer:
            least = cache_bytes(profile, found, 1) if can_fewer else needed
            how = "with one anchor" if can_fewer else f"at {computed_steps:g} computed steps"
            raise BadOption("memory_bytes", most, f"{least} or more, the bytes that {name} keeps {how}")
        options = options | {"anchors": fewer[-1]}


def _demand_types(make: Callable[..., Planned], options: dict[str, Any]) -> None:
    """Raise BadOption for an option of another type than its annotation. The scheduler checks ranges."""
    kinds = {int: (Integral, "a whole number"), float: (Real, "a number"), str: (str, "text")}
    hints, parameters = get_type_hints(make), inspect.signature(make).parameters
    for name, value in options.items():
        if hints.get(name) not in kinds:
            continue
        kind, words = kinds[hints[name]]
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kind) or isinstance(value, bool) or not finite:
            raise BadOption(name, value, f"{words}, such as {parameters[name].default}")


def _only_denoiser(profile: Profile) -> tuple[str, DenoiserProfile]:
    """Return the name and the profile of the one denoiser. Raise BadOption if there are several."""
    if len(profile.denoisers) != 1:
        raise Unusable(
            "profile",
            f"it holds {len(profile.denoisers)} denoisers: {', '.join(profile.denoisers)}",
            "Pass a profile of one denoiser",
        )
    ((name, denoiser),) = profile.denoisers.items()
    return name, denoiser


def _on_grid(online: Online, before: int, after: int) -> Online:
    """Return the decision with steps before and after the loop, which are computed."""
    return dataclasses.replace(online, limit=np.pad(online.limit, (before, after)))


def _spec(name: str, options: dict[str, Any]) -> str:
    """Return a scheduler and its options as a spec."""
    return name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")
