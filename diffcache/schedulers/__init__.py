"""Offline planning: one file, one method.

Two kinds of function live in these files:

* ``rule(grid, **options) -> SitePlan``: needs no measurement; reachable as a short spec, ``"uniform:every=3"``;
* ``plan(profile, budget, **options) -> CacheSchedule``: works from a profile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffcache import _rooms
from diffcache.errors import BadOption, UnknownName
from diffcache.schedule import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.sites import GRANULARITIES


@dataclass(frozen=True, slots=True)
class Grid:
    """The loop a rule plans for: ``timesteps`` float64 [T] of the noise scheduler, and the iteration it starts at."""

    timesteps: np.ndarray
    start: int = 0

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True)
class Rule:
    """A schedule by formula, made when the loop is known: for a first try without calibration.

    ``granularity`` says at which sites it applies; every other option belongs to the scheduler called ``name``.
    """

    name: str
    granularity: str = "model"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = dict(self.options) | ({} if self.granularity == "model" else {"sites": self.granularity})
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")

    def schedule(self, grid: Grid, sites: Mapping[str, tuple[str, ...]]) -> CacheSchedule:
        """The schedule for one loop. ``sites``: denoiser -> names of its sites."""
        site_plan = _function(self.name, self.options)(grid, **self.options)
        wanted = {d: [n for n in names if n.partition(":")[0] == self.granularity] for d, names in sites.items()}
        denoisers = {d: DenoiserPlan(sites=dict.fromkeys(names, site_plan)) for d, names in wanted.items() if names}
        if not denoisers:
            there = sorted({n.partition(":")[0] for names in sites.values() for n in names})
            raise BadOption(
                "sites", self.granularity, f"what {', '.join(sites)} of this pipeline has: {', '.join(there)}"
            )
        return CacheSchedule(steps=grid.steps, denoisers=denoisers, provenance={"scheduler": str(self)})


def rules() -> tuple[str, ...]:
    """Names that a short spec may begin with: looking for a function means importing every file, numpy only."""
    return tuple(name for name in _rooms.names(__name__) if hasattr(_rooms.load(__name__, name), "rule"))


def parse_rule(spec: str) -> Rule:
    """``"name:key=value,key=value"`` -> Rule. Values are numbers; ``sites=block`` picks the granularity."""
    name, _, rest = spec.partition(":")
    if name not in rules():
        raise UnknownName("rule", name, rules(), next_step='A spec reads like "uniform:every=3".')
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in options:
            raise BadOption(key, value, f"one value, in the spec {spec!r}")
        options[key] = _number(spec, key, value) if equals and key != "sites" else value
    granularity = options.pop("sites", "model")
    if granularity not in GRANULARITIES:
        raise BadOption("sites", granularity, f"one of {', '.join(GRANULARITIES)}")
    # A value it cannot take is refused here, not in the run.
    _function(name, options)(Grid(np.linspace(1.0, 0.1, 10)), **options)
    return Rule(name, granularity, options)


def _function(name: str, options: Iterable[str]) -> Callable[..., SitePlan]:
    """The rule of that name, once it is known to have these options."""
    function: Callable[..., SitePlan] | None = getattr(_rooms.load(__name__, name), "rule", None)
    if function is None:
        raise UnknownName("rule", name, rules(), next_step="What plans from a profile is no rule.")
    known = [p for p in inspect.signature(function).parameters if p != "grid"]
    for key in options:
        if key not in known:
            raise UnknownName(f"option of {name!r}", key, [*known, "sites"])
    return function


def _number(spec: str, key: str, value: str) -> float | int:
    try:
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    except ValueError:
        raise BadOption(key, value, f"a number, in the spec {spec!r}") from None
