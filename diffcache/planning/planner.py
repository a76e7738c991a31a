"""Plan a schedule from a profile and a budget, with any scheduler."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import numpy as np

from diffcache import registry, schedulers
from diffcache.documents.budget import Budget
from diffcache.documents.document import configurations
from diffcache.documents.profile import DenoiserProfile, Profile
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, Expected, Online, SitePlan, StoreFormat
from diffcache.errors import BadOption, DocumentError
from diffcache.planning.storage import bytes_held, within
from diffcache.schedulers import Planned
from diffcache.simulation.simulator import Simulator

DEMO_FILE, DEMO_STEPS = "demo_psnr.json", "12 of 50 steps computed"  # as benchmarks/methods.py measured them


@dataclass(frozen=True, slots=True)
class Scheduler:
    """One line of ``diffcache plan --list``.

    Attributes:
        name: The name of its file, which is what users type.
        summary: The first line of its file.
        source: The paper, and the repository that it was compared with.
        options: Name -> default.
        needs: What a profile must hold beyond the tables of the model's outputs.
        group: One of ``schedulers.GROUPS``.
        demo_db: Demo model -> PSNR of the decoded picture in dB, at ``DEMO_STEPS``; without models that the method was
            not measured on.
    """

    name: str
    summary: str
    source: str
    options: dict[str, Any]
    needs: str = ""
    group: str = "published methods"
    demo_db: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compared:
    """What one scheduler makes of a profile and a budget: a schedule, or the reason why there is none."""

    name: str
    schedule: CacheSchedule | None
    reason: str = ""


def available() -> tuple[Scheduler, ...]:
    """Return every scheduler that plans from a profile, by group and name."""
    measured = json.loads(resources.files(schedulers).joinpath(DEMO_FILE).read_text())["psnr_db"]
    found = [_described(name, measured) for name in schedulers.having("plan")]
    return tuple(sorted(found, key=lambda one: (schedulers.GROUPS.index(one.group), one.name)))


def compare(profile: Profile, budget: Budget | float) -> list[Compared]:
    """Plan with every scheduler, each with its default options.

    Args:
        profile: What to plan from.
        budget: A budget, or a number of computed steps.

    Returns:
        One entry per scheduler. Schedules that expect a fidelity come first, the highest PSNR at the top; then
        schedules whose final state is not simulated; then schedulers that cannot plan from this profile.
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
    """The schedule that ``scheduler`` makes of ``profile`` within ``budget`` (a bare number: computed steps).

    scheduler  a name of :func:`available`, or a spec with options, ``"meancache:gamma=4"``
    store      format in which outputs are kept: "bf16", "int8", "fp8", "int4"; "auto": of each site the one with which
               all fit into the budget's ``memory_bytes`` at the least error; None: as they are. A fidelity that is
               simulated counts them as kept exactly
    prescale   take centre and spread of channels from the profile, not from each tensor that is kept

    No network is called. Raises UnknownName, BadOption; an impossible budget is a BadOption that says what is possible.
    """
    budget = Budget.of(budget)
    name, options = schedulers.parse_spec(scheduler, "plan", options)
    make = schedulers.function(name, "plan", options)
    keeping = _Keeping(budget.memory_bytes, store, prescale)
    _demand_types(make, options)
    if not isinstance(profile, Profile):
        raise BadOption("profile", type(profile).__name__, "a Profile: Profile.load(path) reads one")
    _only_denoiser(profile)

    def planned(computed_steps: float) -> Planned:
        return _within_memory(profile, name, make, options, computed_steps, keeping)

    if budget.computed_steps is not None:
        found = planned(_steps(profile, budget.computed_steps))
    elif budget.speedup is not None:
        found = planned(steps_for_speedup(profile, budget.speedup))
    else:
        assert budget.max_error_db is not None
        found = _cheapest(profile, planned, budget.max_error_db)
    return document(profile, found, {"budget": str(budget)})


def check_scheduler(scheduler: str) -> None:
    """Raise UnknownName or BadOption unless ``scheduler`` is the spec of one, with its options and their types."""
    name, options = schedulers.parse_spec(scheduler, "plan")
    _demand_types(schedulers.function(name, "plan", options), options)


def check_store(store: str | None, budget: Budget) -> None:
    """Raise BadOption unless outputs can be kept so; "auto" needs a budget that limits memory."""
    _Keeping(budget.memory_bytes, store, prescale=False)


def document(profile: Profile, planned: Planned, notes: dict[str, str]) -> CacheSchedule:
    """The schedule of these decisions, in the circumstances of the profile."""
    name, denoiser = _only_denoiser(profile)
    before = profile.start  # a loop that starts late never enters the steps before; they count as computed
    return CacheSchedule(
        steps=before + profile.steps,
        denoisers={
            name: DenoiserPlan(
                sites={site: _begun_late(plan, before) for site, plan in planned.sites.items()},
                online=planned.online and _asked_late(planned.online, before),
                called=np.arange(before + profile.steps) >= before,
                class_name=denoiser.class_name,
                config_digest=denoiser.config_digest,
            )
        },
        noise_scheduler=profile.noise_scheduler,
        guidance=profile.guidance,
        timesteps=None if before else profile.timesteps,
        sigmas=planned.sigmas,
        expected=planned.expected or expected(profile, planned),
        provenance={**planned.notes, **notes, "profile": profile.digest(), **configurations(profile.provenance)},
    )


def expected(profile: Profile, planned: Planned) -> Expected | None:
    """What the simulation of a plan ends at; None where the profile or the plan does not allow one."""
    if profile.dynamics is None or planned.online or planned.sigmas is not None or set(planned.sites) != {"model"}:
        return None
    simulator = Simulator(profile.dynamics)
    run = simulator.played(planned.sites["model"])
    return None if run is None else Expected.over(simulator.psnr_db(run), "simulated")


def cache_bytes(profile: Profile, planned: Planned, anchors: int | None = None) -> int:
    """Most bytes of kept tensors at one time, for the batch that was profiled: outputs, and inputs that κ and v need.

    anchors  as if predictions used the newest so many outputs only
    """
    _, denoiser = _only_denoiser(profile)
    held = np.zeros(profile.steps, np.int64)
    for name, plan in planned.sites.items():
        site = denoiser.sites[name]
        held += bytes_held(site, plan, anchors)
    return int(held.max())


def steps_for_speedup(profile: Profile, speedup: float) -> float:
    """How many computed steps the loop may have, by the profile's clock: what is not the denoiser stays."""
    _, denoiser = _only_denoiser(profile)
    root = denoiser.sites.get("model")
    if root is None or not root.seconds or not profile.seconds:
        raise BadOption("speedup", speedup, "a budget in computed_steps: this profile measured no seconds of the loop")
    step = min(root.seconds * root.calls, profile.seconds / profile.steps)  # a median may exceed the mean
    rest = profile.seconds - step * profile.steps
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


def _cheapest(profile: Profile, planned: Callable[[float], Planned], least_db: float) -> Planned:
    """The plan of fewest computed steps that is expected to be good enough; fidelity need not rise with every step."""
    best, best_db = 0, -math.inf
    for computed_steps in range(1, profile.steps + 1):
        try:
            found = planned(computed_steps)
        except BadOption as error:
            if error.name != "computed_steps" or (computed_steps == profile.steps and not best):
                raise
            continue  # fewer than this scheduler can do with
        seen = found.expected or expected(profile, found)
        if seen is None:
            raise BadOption(
                "max_error_db", least_db, "a budget in computed_steps: what this plan would end at cannot be simulated"
            )
        if seen.mean_db >= least_db:
            return found
        if seen.mean_db > best_db:
            best, best_db = computed_steps, seen.mean_db
    raise BadOption("max_error_db", least_db, f"up to {best_db:.1f}, at {best} computed steps")


@dataclass(frozen=True, slots=True)
class _Keeping:
    """How the outputs of a plan are to be kept. ``most``: bytes at one time."""

    most: int | None
    store: str | None
    prescale: bool

    def __post_init__(self) -> None:
        allowed = (None, "auto", *get_args(StoreFormat))
        if self.store not in allowed:
            raise BadOption("store", self.store, ", ".join(map(repr, allowed)))
        if self.store == "auto" and self.most is None:
            raise BadOption("store", "auto", "a format, or 'auto' with a budget that says memory_bytes")

    def of(self, profile: Profile, found: Planned) -> tuple[Planned, bool]:
        """The plan with its formats, and whether it fits. The smallest format, where even that is too large."""
        _, denoiser = _only_denoiser(profile)
        if self.store == "auto":
            assert self.most is not None
            chosen = within(profile, denoiser.sites, found, self.most)
            return chosen or _kept_in(found, "int4"), chosen is not None
        kept = found if self.store is None else _kept_in(found, self.store)
        return kept, self.most is None or cache_bytes(profile, kept) <= self.most

    def prescaled(self, profile: Profile, found: Planned) -> Planned:
        if not self.prescale:
            return found
        _, denoiser = _only_denoiser(profile)
        sites = {
            name: dataclasses.replace(plan, prescale=denoiser.sites[name].channels) if plan.store else plan
            for name, plan in found.sites.items()
        }
        return dataclasses.replace(found, sites=sites)


def _kept_in(found: Planned, store: Any) -> Planned:
    plans = {name: dataclasses.replace(plan, store=store) for name, plan in found.sites.items()}
    return dataclasses.replace(found, sites=plans)


def _within_memory(
    profile: Profile,
    name: str,
    make: Callable[..., Planned],
    options: dict[str, Any],
    computed_steps: float,
    keeping: _Keeping,
) -> Planned:
    """The plan, if need be with fewer anchors than the options say; its notes say with which options it was made."""
    most = keeping.most
    while True:
        found, fits = keeping.of(profile, make(profile, computed_steps, **options))
        if fits:
            notes = {**found.notes, "scheduler": _spec(name, options)}
            return dataclasses.replace(keeping.prescaled(profile, found), notes=notes)
        assert most is not None
        needed = cache_bytes(profile, found)
        kept = max(plan.anchors for plan in found.sites.values())
        can_fewer = "anchors" in inspect.signature(make).parameters
        fewer = [n for n in range(1, kept) if can_fewer and cache_bytes(profile, found, n) <= most]
        if not fewer:
            least = cache_bytes(profile, found, 1) if can_fewer else needed
            how = "with one anchor" if can_fewer else f"at {computed_steps:g} computed steps"
            raise BadOption("memory_bytes", most, f"{least} or more, which {name} keeps {how}")
        options = options | {"anchors": fewer[-1]}


def _demand_types(make: Callable[..., Planned], options: dict[str, Any]) -> None:
    """Options that are numbers are numbers; what else they may be, the scheduler says."""
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
    if len(profile.denoisers) != 1:
        raise BadOption("profile", f"one of {', '.join(profile.denoisers)}", "a profile of one denoiser")
    ((name, denoiser),) = profile.denoisers.items()
    return name, denoiser


def _begun_late(plan: SitePlan, before: int) -> SitePlan:
    if not before:
        return plan

    def later(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.pad(array, [(0, 0), (before, 0), *[(0, 0)] * (array.ndim - 2)])

    return dataclasses.replace(
        plan,
        compute=np.concatenate([np.ones(before, bool), plan.compute]),
        weights=np.pad(plan.weights, ((0, 0), (before, 0), (0, 0))),
        kappa=later(plan.kappa),
        inputs=later(plan.inputs),
        scale=later(plan.scale),
        bias=later(plan.bias),
    )


def _asked_late(online: Online, before: int) -> Online:
    return dataclasses.replace(online, limit=np.concatenate([np.zeros(before), online.limit]))


def _described(name: str, measured: dict[str, dict[str, float]]) -> Scheduler:
    module = registry.load(schedulers.__name__, name)
    parameters = inspect.signature(module.plan).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    summary = (module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    group = getattr(module, "GROUP", "published methods")
    demo_db = {model: decibels[name] for model, decibels in measured.items() if name in decibels}
    return Scheduler(name, summary, module.SOURCE, options, module.NEEDS, group, demo_db)


def _spec(name: str, options: dict[str, Any]) -> str:
    return name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")
