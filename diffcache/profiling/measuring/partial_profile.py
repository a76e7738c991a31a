"""Partial profiles: measurements of some calls, in a form that can be added up to one profile.

Tables are sums over samples. Values that cannot be added are kept for each call. Values that are the same for all calls
come from the first call. Files and messages between processes use the container of the documents, not pickle.
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
VERSION = 4

COST_ARRAYS = ("influence", "channels")  # fields of SiteCosts

Arrays = dict[str, np.ndarray]


@dataclass(slots=True)
class CallProfile:
    """The values that are kept for each call.

    Attributes:
        facts: Facts about the run.
        arrays: "grams" [N, T, T] and "peaks" [N] if the loop can be replayed. "answers" [3, N, T] if the network's
            answers to errors were measured.
        left_out: Site -> why it has no tables.
    """

    facts: RunFacts
    arrays: Arrays = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class SiteCosts:
    """The cost of one call of a site, from the first call of the pipeline.

    Attributes:
        seconds: Median time.
        flops: Operations.
        calls: Number of calls in one step.
        output_bytes: Size of one output.
        influence: float64 [T], or None.
        kept: Format -> the cost of keeping outputs in it.
        channels: float64 [2, C], mean and standard deviation of channels, or None.
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
    """The values that the first call provides for all calls.

    Attributes:
        denoiser: Name of the component, class, digest of the configuration.
        noise_scheduler: The noise scheduler.
        rest_s: Seconds of its loop outside the denoiser.
        forwards: Number of the denoiser's forwards in its loop.
        costs: Site -> cost. Sites without an entry were not called.
        arrays: "timesteps" [T]; "sigmas" [T + 1] if there are any; "reach" [T, T] if the loop can be replayed.
        notes: Entries of the profile's provenance.
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
    """Measurements of some calls.

    Attributes:
        sites: Site -> one ``Sums`` per branch.
        calls: Index in the list of calls -> the values of that call.
        first: The values of the first call, if it is among these calls.
    """

    sites: dict[str, list[Sums]] = field(default_factory=dict)
    calls: dict[int, CallProfile] = field(default_factory=dict)
    first: FirstCall | None = None

    def merge(self, other: PartialProfile) -> None:
        """Add the measurements of other calls.

        Raises:
            BadOption: The calls differ so that one profile cannot describe them.
        """
        calls = self.calls | other.calls
        demand_agreement([calls[index].facts for index in sorted(calls)])
        for site, theirs in other.sites.items():
            mine = self.sites.get(site, [Sums() for _ in theirs])
            if len(mine) != len(theirs):  # one of the two could not distinguish branches
                mine, theirs = _together(mine), _together(theirs)
            for a, b in zip(mine, theirs, strict=True):
                a.merge(b)
            self.sites[site] = mine
        self.calls = calls
        self.first = self.first or other.first

    def profile(self) -> Profile:
        """Return the profile of all calls. The first call must be among them."""
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
            after=runs[0].grid[0] - runs[0].grid[2],
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
        """Return the profiles of the sites that all calls have, and the reasons why other sites have none."""
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
        """Return the dynamics and "", or None and the reason why there are none."""
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
        return with_answer(found, np.concatenate(heard, axis=1)) if heard else found, ""

    # ----------------------------------------------------------------- bytes

    def to_bytes(self, **more: np.ndarray) -> bytes:
        """Return the measurements as a container. ``more``: further arrays, which ``from_bytes`` returns."""
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
        """Read what ``to_bytes`` returned.

        Returns:
            The partial profile, and the further arrays.

        Raises:
            DocumentError: The data is damaged. The error names ``where``.
        """
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
    """Return the sums of all branches, as one branch."""
    whole = Sums()
    for branch in sums:
        whole.merge(branch)
    return [whole]
