"""Plan schedules: one file per method, named as in its paper.

A file has one or both of these functions:

* ``rule(grid, **options) -> SitePlan`` needs no measurement. Users name it by a short spec, ``"uniform:every=3"``. A
  rule that leaves decisions to the run returns ``(SitePlan, Online)``, and one that has more to state a ``Ruled``.
  ``GRANULARITY`` sets the sites of a rule unless a spec sets others; the default is "model". A rule that reads
  ``grid.networks`` has a function ``check(**options)`` next to it, which raises for options out of range before the
  network is known.
* ``plan(profile, computed_steps, **options) -> Planned`` works from a profile, and ``diffcache.plan`` calls it.
  ``computed_steps`` is the work to do, in full steps of the loop: a whole number for methods that decide about whole
  steps. Sites and steps are those of the profile.

A file with ``plan`` also has these constants:

* ``SOURCE``: the paper, and the repository and commit that it was compared with;
* ``NEEDS``: the tables that the profile must hold beyond those of the model's outputs; "" for none;
* ``GROUP``: one of ``GROUPS``. The default is "published methods";
* ``ALIASES``: names of the method in earlier versions, as specs -> the options that each of them implies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from diffcache import registry
from diffcache.documents.context import ScheduleContext
from diffcache.documents.schedule import CacheSchedule, Expected, Online, SitePlan
from diffcache.documents.sites import GRANULARITIES
from diffcache.errors import BadOption, UnknownName
from diffcache.presets import NetworkFacts

Aliases = Mapping[str, Mapping[str, Any]]
GROUPS = ("start here", "published methods", "other methods", "inside the network")
_TITLE = {"rule": "rule", "plan": "scheduler"}  # the names of files with such a function in errors


@dataclass(frozen=True, slots=True)
class Grid:
    """The loop that a rule plans for.

    Attributes:
        timesteps: float64 [T], the timesteps of the noise scheduler.
        start: The iteration at which the loop begins.
        networks: Component name -> the facts about the network that the loop calls. Empty if they are not known.
        guided: Whether the run uses classifier-free guidance. None if that is not known.
        propagation: Returns what the output of each step adds to the later states through the noise scheduler, float64
            [T, T] at [later step, step]; None if that is not known.
    """

    timesteps: np.ndarray
    start: int = 0
    networks: Mapping[str, NetworkFacts] = field(default_factory=dict)
    guided: bool | None = None
    propagation: Callable[[], np.ndarray | None] = lambda: None

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The decisions of a scheduler for the one denoiser of a profile.

    Attributes:
        sites: Site -> its plan.
        online: The decision that is left to the run, or None.
        sigmas: float64 [T + 1], moved noise levels, or None.
        expected: The expected fidelity. None: a simulation of the plan estimates it, if possible.
        notes: Entries of the schedule's provenance.
    """

    sites: Mapping[str, SitePlan]
    online: Online | None = None
    sigmas: np.ndarray | None = None
    expected: Expected | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruled:
    """The decisions of a rule that has more to state than a plan.

    Attributes:
        plan: The plan of each site.
        online: The decision that is left to the run, or None.
        stacks: The paths of the stacks that the plan is for. None: every site of the granularity. Otherwise the rule
            applies to stacks alone.
        notes: Entries of the schedule's provenance.
    """

    plan: SitePlan
    online: Online | None = None
    stacks: tuple[str, ...] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """A schedule by formula, which is made when the loop is known. It needs no calibration.

    Attributes:
        name: The name of the scheduler's file.
        granularity: The granularity of the sites that the rule applies to.
        options: The options of the scheduler.
    """

    name: str
    granularity: str = "model"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, options = canonical(self.name, self.options, "rule")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", options)

    def __str__(self) -> str:
        options = dict(self.options) | ({} if self.granularity == "model" else {"sites": self.granularity})
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")

    def schedule(self, grid: Grid, sites: Mapping[str, tuple[str, ...]]) -> CacheSchedule:
        """Make the schedule for one loop.

        Args:
            grid: The loop.
            sites: Denoiser -> names of its sites.

        Raises:
            BadOption: No denoiser has a site of the rule's granularity, or the rule is for sites of another one.
            UnsupportedModel: The rule has no constants for the network.
        """
        made = self._made(grid)
        if made.stacks is not None and self.granularity != "stack":
            raise BadOption("sites", self.granularity, f"stack: the constants of {self.name!r} are those of stacks")
        stacks = None if made.stacks is None else {f"stack:{path}" for path in made.stacks}
        wanted = {
            d: [n for n in names if n.partition(":")[0] == self.granularity and (stacks is None or n in stacks)]
            for d, names in sites.items()
        }
        plans = {d: dict.fromkeys(names, made.plan) for d, names in wanted.items() if names}
        if not plans:
            there = sorted({n.partition(":")[0] for names in sites.values() for n in names})
            raise BadOption(
                "sites", self.granularity, f"what {', '.join(sites)} of this pipeline has: {', '.join(there)}"
            )
        notes = {"scheduler": str(self), **made.notes}
        return ScheduleContext(steps=grid.steps).schedule(plans, online=made.online, notes=notes)

    def _made(self, grid: Grid) -> Ruled:
        """Return the decisions of the rule for one loop."""
        made: Ruled | SitePlan | tuple[SitePlan, Online]
        made = function(self.name, "rule", self.options)(grid, **self.options)
        if isinstance(made, Ruled):
            return made
        plan, online = made if isinstance(made, tuple) else (made, None)
        return Ruled(plan=plan, online=online)


def having(kind: str) -> tuple[str, ...]:
    """Return the names of the files with a function ``kind``. This imports every file; they need numpy only."""
    return tuple(name for name, module in registry.modules(__name__).items() if hasattr(module, kind))


def rules() -> tuple[str, ...]:
    """Return the names of all rules."""
    return having("rule")


def _aliases(old: str, kind: str) -> list[tuple[dict[str, Any], str, Mapping[str, Any]]]:
    """Return the methods that an old name may mean, those with the most options first.

    Returns:
        Tuples of the options that are part of the old name, the name of the method, and the options that the old name
        implies.
    """
    found = []
    for name, module in registry.modules(__name__).items():
        for spec, options in getattr(module, "ALIASES", {}).items() if hasattr(module, kind) else ():
            alias, _, rest = spec.partition(":")
            if alias == old:
                found.append((registry.options(spec, rest), name, options))
    return sorted(found, key=lambda way: -len(way[0]))


def canonical(name: str, options: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the file of a method, and its options.

    Args:
        name: The name of a file in any case, with hyphens or underscores; or a name of earlier versions:
            ``"threshold"`` with the option ``kind="magcache"`` is ``"magcache"``.
        options: The options given with it.
        kind: "rule" or "plan". A name that has no file with this kind is returned unchanged.
    """
    known, spelled = having(kind), name.lower().replace("-", "_")
    if name in known or spelled in known:
        return name if name in known else spelled, dict(options)
    for part, new, more in _aliases(spelled, kind):
        if part.items() <= dict(options).items():
            return new, {**more, **{key: value for key, value in options.items() if key not in part}}
    return name, dict(options)


def is_rule(spec: str) -> bool:
    """Return whether a text begins like the spec of a rule."""
    return canonical(spec.partition(":")[0], {}, "rule")[0] in rules()


def parse_rule(spec: str) -> Rule:
    """Return the rule of a spec, ``"name:key=value,key=value"``. ``sites=block`` sets the granularity.

    Raises:
        UnknownName: There is no such rule or option.
        BadOption: The text is not a spec, or an option is out of range.
    """
    name, options = parse_spec(spec, "rule")
    granularity = options.pop("sites", getattr(registry.load(__name__, name), "GRANULARITY", "model"))
    if granularity not in GRANULARITIES:
        raise BadOption("sites", granularity, f"one of {', '.join(GRANULARITIES)}")
    # The call raises for a value out of range here, before the run.
    rule = function(name, "rule", options, spec=spec)
    check = getattr(registry.load(__name__, name), "check", None)
    if check is None:
        rule(Grid(np.linspace(1.0, 0.1, 10)), **options)
    else:
        check(**options)
    return Rule(name, granularity, options)


def parse_spec(spec: str, kind: str, more: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, dict[str, Any]]:
    """Return the name of a file that has ``kind``, and the options, of ``"name:key=value,key=value"``.

    Args:
        spec: The name, followed by a colon and the options.
        kind: "rule" or "plan".
        more: Further options, which override those of the spec.

    Raises:
        UnknownName: If no file of this name has ``kind``.
        BadOption: If the text is not a spec.
    """
    if not isinstance(spec, str):
        raise BadOption(_TITLE[kind], type(spec).__name__, 'text such as "uniform:every=3"')
    name, _, rest = spec.partition(":")
    name, options = canonical(name, {**registry.options(spec, rest), **more}, kind)
    if name not in having(kind):
        example = "uniform:every=3" if kind == "rule" else "meancache:gamma=4"
        if kind == "rule" and name in having("plan"):
            advice = (
                f"{name!r} plans from a profile: measure one with `diffcache profile MODEL`, and pass the schedule of "
                f"`diffcache plan PROFILE --scheduler {name} --computed N`."
            )
            raise UnknownName(_TITLE[kind], name, having(kind), next_step=advice, suggest=False)
        raise UnknownName(_TITLE[kind], name, having(kind), next_step=f'A spec reads like "{example}".')
    return name, options


def function(name: str, kind: str, options: Iterable[str], *, spec: str = "") -> Callable[..., Any]:
    """Return the function ``kind`` of the file ``name``.

    Args:
        name: The name of a file.
        kind: "rule" or "plan".
        options: The names of the options that are given.
        spec: The text that they are from, for errors.

    Raises:
        UnknownName: If there is no such function, or it has not one of ``options``.
    """
    found: Callable[..., Any] | None = getattr(registry.load(__name__, name), kind, None)
    if found is None:
        raise UnknownName(_TITLE[kind], name, having(kind), next_step="It has no function of that kind.")
    known = [p for p in inspect.signature(found).parameters if p not in ("grid", "profile", "computed_steps")]
    for key in options:
        if key not in known and not (kind == "rule" and key == "sites"):
            advice = registry.argument_advice(spec, key) if spec else ""
            names = [*known, "sites"] if kind == "rule" else known
            raise UnknownName(f"option of {name!r}", key, names, next_step=advice, suggest=not advice)
    return found
