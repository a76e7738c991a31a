"""What measured calls told, in a form that adds up: findings of several calls, processes or days make one profile.

Tables are sums over samples; what must stay apart is held call by call; what one call tells for all comes from the
first. It goes through files and between processes in the container of the documents: no pickle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffcache.documents import container
from diffcache.documents.checks import refuse
from diffcache.documents.profile import DenoiserProfile, Dynamics, KeptProfile, Profile, SiteProfile
from diffcache.documents.schedule import NoiseSchedulerId
from diffcache.profiling.fitting.dynamics import with_answer
from diffcache.profiling.measuring.tables import Sums, site_tables
from diffcache.profiling.replay.run_facts import RunFacts, demand_agreement, guidance_of

FORMAT = "diffcache.findings"
VERSION = 2

COST_ARRAYS = ("influence", "channels")  # of SiteCosts

Arrays = dict[str, np.ndarray]


@dataclass(slots=True)
class CallProfile:
    """Of one call. ``arrays``: grams [N, T, T] and peaks [N] where it can be replayed, product and energy [T] where the
    network's answers to errors were looked at. ``left_out``: site -> why it has no tables."""

    facts: RunFacts
    arrays: Arrays = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class SiteCosts:
    """Of one call of a site, by the first call of the pipeline.

    influence  float64 [T] or None
    kept       by format
    channels   float64 [2, C] or None
    """

    seconds: float
    flops: int
    calls: int
    output_bytes: int
    influence: np.ndarray | None = None
    kept: dict[str, KeptProfile] = field(default_factory=dict)
    channels: np.ndarray | None = None


@dataclass(slots=True)
class FirstCall:
    """What the first call tells for all.

    denoiser   name of the component, class, digest of the configuration
    rest_s     seconds of its loop outside the denoiser
    forwards   of the denoiser, in its loop
    costs      by site; sites that have none were not called
    arrays     timesteps [T]; sigmas [T + 1] where there are any; reach [T, T] where it can be replayed
    """

    denoiser: tuple[str, str, str]
    noise_scheduler: NoiseSchedulerId
    rest_s: float
    forwards: int
    costs: Mapping[str, SiteCosts]
    arrays: Arrays
    notes: Mapping[str, str]


@dataclass(slots=True)
class PartialProfile:
    """``sites``: site -> one ``Sums`` per branch. ``calls``: by their place in the list of calls."""

    sites: dict[str, list[Sums]] = field(default_factory=dict)
    calls: dict[int, CallProfile] = field(default_factory=dict)
    first: FirstCall | None = None

    def merge(self, other: PartialProfile) -> None:
        """What ``other`` found as well. Raises BadOption for calls that no one profile could describe."""
        calls = self.calls | other.calls
        demand_agreement([calls[index].facts for index in sorted(calls)])
        for site, theirs in other.sites.items():
            mine = self.sites.get(site, [Sums() for _ in theirs])
            if len(mine) != len(theirs):  # one of the two could not tell branches apart
                mine, theirs = _together(mine), _together(theirs)
            for a, b in zip(mine, theirs, strict=True):
                a.merge(b)
            self.sites[site] = mine
        self.calls = calls
        self.first = self.first or other.first

    def profile(self) -> Profile:
        """All of it as a profile; some findings must be those of the first call."""
        first = self.first
        assert first is not None
        calls = [self.calls[index] for index in sorted(self.calls)]
        runs = [call.facts for call in calls]
        guidance = guidance_of(runs)
        dynamics, why_none = self._dynamics(first)
        steps = len(first.arrays["timesteps"])
        sites, left_out = self._sites(first, guidance.branches if guidance else 1)
        notes = dict(first.notes)
        notes |= {"no_dynamics": why_none} if why_none else {}
        notes |= {"left_out": "; ".join(f"{site} {why}" for site, why in left_out.items())} if left_out else {}
        model = first.costs["model"]
        name, class_name, digest = first.denoiser
        return Profile(
            steps=steps,
            start=runs[0].grid[1],
            timesteps=first.arrays["timesteps"],
            sigmas=first.arrays.get("sigmas"),
            denoisers={name: DenoiserProfile(class_name=class_name, config_digest=digest, sites=sites)},
            noise_scheduler=first.noise_scheduler,
            guidance=guidance,
            dynamics=dynamics,
            seconds=first.rest_s + first.forwards * model.seconds,
            samples=sum(run.samples for run in runs),
            provenance=notes,
        )

    def _sites(self, first: FirstCall, branches: int) -> tuple[dict[str, SiteProfile], dict[str, str]]:
        """Profiles of the sites that all calls have, and why there is none of others."""
        whys = {s: why for index in sorted(self.calls) for s, why in self.calls[index].left_out.items()}
        samples = sum(branch.samples for branch in self.sites["model"])
        whys |= {s: "is not called in a step's first forward" for s in self.sites if s not in first.costs}
        found = {}
        for site, sums in self.sites.items():
            if sum(branch.samples for branch in sums) == samples and site in first.costs:
                tables = site_tables(sums if len(sums) == branches else _together(sums))
                costs = first.costs[site]
                values = {f.name: getattr(costs, f.name) for f in dataclasses.fields(costs)}
                found[site] = SiteProfile(**tables, **values)
        return found, {site: whys[site] for site in sorted(whys) if site not in found}

    def _dynamics(self, first: FirstCall) -> tuple[Dynamics | None, str]:
        calls = [self.calls[index] for index in sorted(self.calls)]
        obstacle = next((c.facts.obstacle for c in calls if c.facts.obstacle), "")
        if obstacle:
            return None, obstacle
        if any(c.facts.bent for c in calls):
            return None, "the noise scheduler's step is not affine in the model's output (it clips)."
        silent = np.zeros(len(first.arrays["timesteps"]))
        found = Dynamics(
            grams=np.concatenate([c.arrays["grams"] for c in calls]),
            peaks=np.concatenate([c.arrays["peaks"] for c in calls]),
            reach=first.arrays["reach"],
            response=silent,
            spread=silent,
        )
        heard = [c.arrays["answers"] for c in calls if "answers" in c.arrays]
        return with_answer(found, np.sum(heard, axis=0)) if heard else found, ""

    # ----------------------------------------------------------------- bytes

    def to_bytes(self, **more: np.ndarray) -> bytes:
        """A container; ``more``: arrays of the caller's, which ``from_bytes`` gives back."""
        arrays: Arrays = {f"more/{name}": array for name, array in more.items()}
        tree: dict[str, Any] = {"format": FORMAT, "version": VERSION, "sites": {}, "calls": {}, "first": None}
        for site, sums in self.sites.items():
            tree["sites"][site] = [branch.samples for branch in sums]
            for b, branch in enumerate(sums):
                arrays |= {f"sites/{site}/{b}/{name}": array for name, array in branch.arrays.items()}
        for index, call in self.calls.items():
            tree["calls"][str(index)] = dataclasses.asdict(call.facts) | {"left_out": dict(call.left_out)}
            arrays |= {f"calls/{index}/{name}": array for name, array in call.arrays.items()}
        if self.first:
            first = self.first
            arrays |= {f"first/{name}": array for name, array in first.arrays.items()}
            costs = {site: dataclasses.asdict(c) for site, c in first.costs.items()}
            for site, values in costs.items():
                for name in COST_ARRAYS:
                    array = values.pop(name)
                    arrays |= {} if array is None else {f"{name}/{site}": array}
            tree["first"] = {
                "denoiser": list(first.denoiser),
                "noise_scheduler": dataclasses.asdict(first.noise_scheduler),
                "rest_s": first.rest_s,
                "forwards": first.forwards,
                "costs": costs,
                "notes": dict(first.notes),
            }
        return container.pack("findings", tree, arrays)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> tuple[PartialProfile, Arrays]:
        """The inverse of ``to_bytes``: findings, and the caller's arrays. Raises DocumentError, naming ``where``."""
        tree, arrays = container.unpack(where, data)
        if (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
            refuse(where, "format", f"found {tree.get('format')!r:.80}", f"{FORMAT!r}, version {VERSION}")
        try:
            return cls._read(tree, arrays)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # fields that are missing, or of other types
            refuse(where, "findings", f"{type(error).__name__}: {error!s:.100}", "what a measurement writes")

    @classmethod
    def _read(cls, tree: dict[str, Any], arrays: Arrays) -> tuple[PartialProfile, Arrays]:
        def under(prefix: str) -> Arrays:
            return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}

        found = cls()
        for site, samples in tree["sites"].items():
            found.sites[site] = [Sums(n, under(f"sites/{site}/{b}/")) for b, n in enumerate(samples)]
        for index, values in tree["calls"].items():
            left_out = values.pop("left_out")
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            found.calls[int(index)] = CallProfile(RunFacts(**values | lists), under(f"calls/{index}/"), left_out)
        if tree["first"]:
            values = tree["first"]
            for site, costs in values["costs"].items():
                costs["kept"] = {name: KeptProfile(**kept) for name, kept in costs["kept"].items()}
                costs |= {name: arrays.get(f"{name}/{site}") for name in COST_ARRAYS}
                values["costs"][site] = SiteCosts(**costs)
            values["noise_scheduler"] = NoiseSchedulerId(**values["noise_scheduler"])
            values["denoiser"] = tuple(values["denoiser"])
            found.first = FirstCall(**values, arrays=under("first/"))
        return found, under("more/")


def _together(sums: list[Sums]) -> list[Sums]:
    """All branches as one."""
    whole = Sums()
    for branch in sums:
        whole.merge(branch)
    return [whole]
