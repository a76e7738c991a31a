"""Document 2: what offline measurement found, the only thing a scheduler works from. Pure data, numpy only.

Shapes in this file: T steps of the sampling loop, B branches measured apart (1: all together). Checked when it is
made, like a schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from diffcache import _checks
from diffcache._checks import first, place, put, refuse
from diffcache._document import Document, Record
from diffcache.schedule import Guidance, NoiseSchedulerId, check_branches, check_circumstances, check_network

SYMMETRY = 1e-6  # relative to the diagonal: sums in float32 may run in another order on the other side
AXES = {1: ("step",), 2: ("step", "other"), 3: ("branch", "step", "other")}  # by the number of them


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SiteProfile(Record):
    """One site, measured over full runs. F_i is its output at step i; all tables are means over the samples.

    distance      float64 [B, T, T], ‖F_i − F_j‖ / ‖F_j‖ at [b, i, j]: the error of using step j's output at step i
    gram          float64 [B, T, T], ⟨F_i, F_j⟩ per element; symmetric
    seconds       time of one call that computes
    flops         floating-point operations of one such call
    output_bytes  size of one output
    cosine        float64 [B, T, T], ⟨F_i, F_j⟩ / (‖F_i‖ ‖F_j‖), or None; symmetric
    """

    distance: np.ndarray
    gram: np.ndarray
    seconds: float
    flops: int
    output_bytes: int
    cosine: np.ndarray | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, seconds=_checks.real(me, "seconds", self.seconds, least=0))
        for name in ("flops", "output_bytes"):
            put(self, **{name: _checks.count(me, name, getattr(self, name), least=0)})
        put(self, distance=_checks.array(me, "distance", self.distance, np.float64, branch=None, step=None, other=None))
        branches, steps, _ = self.distance.shape
        for name in ("distance", "gram") if self.cosine is None else ("distance", "gram", "cosine"):
            shape = {"branch": branches, "step": steps, "other": steps}
            put(self, **{name: _checks.array(me, name, getattr(self, name), np.float64, **shape)})
        off_diagonal = np.eye(steps) == 0
        _demand(me, "distance", self.distance, self.distance >= 0, "0 or more")
        _demand(me, "distance", self.distance, off_diagonal | (self.distance == 0), "0 on the diagonal")
        _demand(me, "gram", self.gram, off_diagonal | (self.gram >= 0), "0 or more on the diagonal")
        size = np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))
        _demand_symmetry(me, "gram", self.gram, size[:, :, None] * size[:, None, :])
        if self.cosine is not None:
            _demand(me, "cosine", self.cosine, np.abs(self.cosine) <= 1 + SYMMETRY, "-1 to 1")
            _demand_symmetry(me, "cosine", self.cosine, np.ones_like(self.cosine))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenoiserProfile(Record):
    """The measured sites of one denoiser.

    class_name     class of the network
    config_digest  sha256 of its configuration, None if it has none
    sites          ``model``, ``stack:PATH``, ``block:PATH`` or ``sublayer:PATH`` -> its tables; at least one
    """

    class_name: str
    config_digest: str | None = None
    sites: Mapping[str, SiteProfile]

    def __post_init__(self) -> None:
        me = type(self).__name__
        _checks.text(me, "class_name", self.class_name)  # what was measured has a class
        check_network(me, self.class_name, self.config_digest)
        put(self, sites=_checks.named(me, "sites", self.sites, SiteProfile, _checks.site))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dynamics(Record):
    """How the sampling loop passes errors on. m_i is the guided output that the full run hands to its i-th step.

    gram      float64 [T, T], ⟨m_i, m_j⟩ per element; symmetric
    reach     float64 [T, T], at [i, j]: by how much the state after step i moves per unit of what was handed to step j,
              through the noise scheduler alone; 0 for j > i
    response  float64 [T], the part of a state's error that the network's answer repeats: m(x + e) ≈ m(x) + response · e
    """

    gram: np.ndarray
    reach: np.ndarray
    response: np.ndarray

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, response=_checks.array(me, "response", self.response, np.float64, step=None))
        steps = len(self.response)
        for name in ("gram", "reach"):
            put(self, **{name: _checks.array(me, name, getattr(self, name), np.float64, step=steps, other=steps)})
        _demand(me, "gram", self.gram, (np.eye(steps) == 0) | (self.gram >= 0), "0 or more on the diagonal")
        size = np.sqrt(np.diagonal(self.gram))
        _demand_symmetry(me, "gram", self.gram, size[:, None] * size)
        later = np.triu(np.ones((steps, steps), bool), 1)
        _demand(me, "reach", self.reach, ~later | (self.reach == 0), "0 where other > step: it comes later")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile(Document):
    """Full runs of a pipeline, measured.

    steps            number of iterations of the sampling loop
    start            steps of the noise scheduler's grid before the loop's first: above 0 for image to image
    timesteps        float64 [T] the loop ran over
    sigmas           float64 [T + 1] noise levels, the last one where the loop ends, or None if there are none
    denoisers        pipeline component name -> what was measured; at least one
    noise_scheduler  that drove the loop, None if unknown
    guidance         that was in use, None if unknown
    dynamics         of the loop, None if it could not be repeated apart from its pipeline
    samples          number of calibration runs the tables are means of
    provenance       free text by key: prompts, seeds, device, versions
    """

    FORMAT: ClassVar[str] = "diffcache.profile"
    VERSION: ClassVar[int] = 1
    FILENAME: ClassVar[str] = "profile.safetensors"

    steps: int
    start: int = 0
    timesteps: np.ndarray
    sigmas: np.ndarray | None = None
    denoisers: Mapping[str, DenoiserProfile]
    noise_scheduler: NoiseSchedulerId | None = None
    guidance: Guidance | None = None
    dynamics: Dynamics | None = None
    samples: int
    provenance: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("steps", "samples"):
            put(self, **{name: _checks.count(me, name, getattr(self, name), least=1)})
        put(self, start=_checks.count(me, "start", self.start, least=0))
        put(self, timesteps=_checks.array(me, "timesteps", self.timesteps, np.float64, step=self.steps))
        if self.sigmas is not None:
            put(self, sigmas=_checks.array(me, "sigmas", self.sigmas, np.float64, step=self.steps + 1))
            _demand(me, "sigmas", self.sigmas, self.sigmas >= 0, "0 or more")
        put(self, denoisers=_checks.named(me, "denoisers", self.denoisers, DenoiserProfile, _checks.component))
        put(self, provenance=_checks.notes(me, "provenance", self.provenance))
        check_circumstances(me, self.noise_scheduler, self.guidance)
        if self.dynamics is not None:
            steps = len(_checks.instance(me, "dynamics", self.dynamics, Dynamics).response)
            if steps != self.steps:
                refuse(me, "dynamics/response", f"{steps} steps", f"{self.steps}, the steps of the profile")
        for name, denoiser in self.denoisers.items():
            for site, found in denoiser.sites.items():
                branches, steps, _ = found.distance.shape
                at = f"{name}/{site}/distance"
                if steps != self.steps:
                    refuse(me, at, f"{steps} steps", f"{self.steps}, the steps of the profile")
                check_branches(me, at, branches, self.guidance)

    def describe(self) -> str:
        """What was measured, to be read by people: one line per site."""
        lines = [f"{self.steps} steps, {self.samples} samples"]
        for name, denoiser in self.denoisers.items():
            lines.append(f"{name} ({denoiser.class_name})")
            width = max(map(len, denoiser.sites))
            for site, found in denoiser.sites.items():
                drift = np.diagonal(found.distance, offset=-1, axis1=1, axis2=2)
                change = f"changes {drift.mean():.3g} per step, " if drift.size else ""
                cost = f"{1e3 * found.seconds:.3g} ms, {found.flops / 1e9:.3g} GFLOP, {found.output_bytes} bytes"
                lines.append(f"  {site:{width}}  {change}{cost}")
        return "\n".join(lines + [f"{key}: {value}" for key, value in self.provenance.items()])

    def __str__(self) -> str:
        return self.describe()


def _demand(where: str, name: str, table: np.ndarray, holds: np.ndarray, allowed: str) -> None:
    if index := first(~holds):
        refuse(where, name, f"{place(AXES[table.ndim], index)} is {table[index]:g}", allowed)


def _demand_symmetry(where: str, name: str, table: np.ndarray, size: np.ndarray) -> None:
    mirror = np.swapaxes(table, -1, -2)
    if index := first(np.abs(table - mirror) > SYMMETRY * size):
        found = f"{place(AXES[table.ndim], index)} is {table[index]:g}, its mirror image {mirror[index]:g}"
        refuse(where, name, found, "the same on both sides", f"Average them: ({name} + {name}ᵀ) / 2.")
