"""Define the profile, the document of offline measurements from which schedulers plan. Pure data, numpy only.

Shapes in this file: T steps of the sampling loop, and B branches that were measured separately (1: all together). A
profile is checked when it is made, like a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, get_args

import numpy as np

from diffcache.documents import checks
from diffcache.documents.checks import first, index_text, put, refuse
from diffcache.documents.document import Document, Record, Tree, Upgrade, spoken
from diffcache.documents.schedule import (
    Guidance,
    NoiseSchedulerId,
    StoreFormat,
    check_branches,
    check_circumstances,
    check_network,
    upgrade_guidance,
)
from diffcache.text import card, printable

SYMMETRY = 1e-6  # relative to the diagonal, because sums in float32 may have another order on the other side
_WHICH = ("which", "channel")
AXES = {1: ("step",), 2: ("step", "other"), 3: ("branch", "step", "other")}  # number of axes -> their names


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables(Record):
    """Distances between tensors X_0 … X_{T-1}, one per step. All tables are means over the samples.

    Attributes:
        l1: float64 [B, T, T], mean of |X_i − X_j| over the elements; symmetric.
        relative_l1: float64 [B, T, T], ‖X_i − X_j‖₁ / ‖X_j‖₁ at [b, i, j]: the error if X_j replaces X_i.
        gram: float64 [B, T, T], ⟨X_i, X_j⟩ per element; symmetric.

    Raises:
        DocumentError: If a table has another shape or impossible values.
    """

    l1: np.ndarray
    relative_l1: np.ndarray
    gram: np.ndarray

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, l1=checks.array(me, "l1", self.l1, np.float64, branch=None, step=None, other=None))
        branches, steps, _ = self.l1.shape
        for name in ("l1", "relative_l1", "gram"):
            shape = {"branch": branches, "step": steps, "other": steps}
            put(self, **{name: checks.array(me, name, getattr(self, name), np.float64, **shape)})
        off_diagonal = np.eye(steps) == 0
        for name in ("l1", "relative_l1"):
            _demand(me, name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
            _demand(me, name, getattr(self, name), off_diagonal | (getattr(self, name) == 0), "0 on the diagonal")
        _demand(me, "gram", self.gram, off_diagonal | (self.gram >= 0), "0 or more on the diagonal")
        _demand_symmetry(me, "l1", self.l1, np.full_like(self.l1, max(self.l1.max(), 1e-300)))
        size = np.sqrt(self.energy)
        _demand_symmetry(me, "gram", self.gram, size[:, :, None] * size[:, None, :])

    @property
    def energy(self) -> np.ndarray:
        """The mean square of the elements, float64 [B, T]."""
        return np.asarray(np.diagonal(self.gram, axis1=1, axis2=2))

    @property
    def squared(self) -> np.ndarray:
        """The mean square of X_i − X_j per element, float64 [B, T, T]."""
        return np.asarray(np.maximum(self.energy[:, :, None] + self.energy[:, None, :] - 2 * self.gram, 0))

    @property
    def cosine(self) -> np.ndarray:
        """The cosine of all samples flattened into one vector, float64 [B, T, T]; 1 where a tensor is all zero."""
        size = np.sqrt(self.energy)
        product = size[:, :, None] * size[:, None, :]
        ratio = np.divide(self.gram, product, out=np.ones_like(self.gram), where=product > 0)
        return np.asarray(np.clip(ratio, -1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptProfile:
    """The cost of keeping a site's outputs in one format.

    Attributes:
        bytes: Size of one output.
        error: Mean square of the kept output less the output, per element.
    """

    bytes: int
    error: float

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, bytes=checks.count(me, "bytes", self.bytes, least=0))
        put(self, error=checks.real(me, "error", self.error, least=0))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SiteProfile(Record):
    """The measurements of one site in full runs. x_i is its input and F_i its output at step i.

    Attributes:
        output: Tables of F_i.
        residual: Tables of F_i − x_i. If one has more channels (a learned variance, a condition), its leading channels
            are used. None: the two differ in more than channels.
        residual_ratio: float64 [B, T], mean over the vectors along the channels of ‖F_i − x_i‖ / ‖F_{i-1} − x_{i-1}‖,
            and 1 at step 0. None if there is no residual.
        input_change: float64 [B, T], ‖x_i − x_{i-1}‖₁ / ‖x_{i-1}‖₁, and 0 at step 0.
        modulated_change: The same for the output of the first normalisation inside the site. None if there is none.
        influence: float64 [T], mean square change of the denoiser's output per mean square change of F_i, if F_i alone
            is replaced by its value one step before. None if not measured.
        seconds: Time of one call that computes, in seconds.
        flops: Floating-point operations of one such call.
        calls: Number of calls in one step.
        output_bytes: Size of one output in bytes.
        kept: Format -> the cost of keeping outputs in it. Empty if not measured.
        channels: float64 [2, C], mean and standard deviation of every channel of the output. None if channels are not
            the last dimension, or if not measured.

    Raises:
        DocumentError: If a field is not valid.
    """

    output: Tables
    residual: Tables | None = None
    residual_ratio: np.ndarray | None = None
    input_change: np.ndarray
    modulated_change: np.ndarray | None = None
    influence: np.ndarray | None = None
    seconds: float
    flops: int
    calls: int
    output_bytes: int
    kept: Mapping[str, KeptProfile] = field(default_factory=lambda: MappingProxyType({}))
    channels: np.ndarray | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, seconds=checks.real(me, "seconds", self.seconds, least=0))
        put(self, calls=checks.count(me, "calls", self.calls, least=1))
        for name in ("flops", "output_bytes"):
            put(self, **{name: checks.count(me, name, getattr(self, name), least=0)})
        shape = checks.instance(me, "output", self.output, Tables).gram.shape
        if self.residual is not None and checks.instance(me, "residual", self.residual, Tables).gram.shape != shape:
            refuse(me, "residual/l1", f"found shape {list(self.residual.l1.shape)}", f"{list(shape)}, as of the output")
        rows = {"branch": shape[0], "step": shape[1]}
        for name, axes in (
            ("residual_ratio", rows),
            ("input_change", rows),
            ("modulated_change", rows),
            ("influence", {"step": shape[1]}),
        ):
            value = getattr(self, name)
            if value is None and name != "input_change":
                continue
            value = checks.array(me, name, value, np.float64, **axes)
            put(self, **{name: value})
            _demand(me, name, value, value >= 0, "0 or more", tuple(axes))
        put(self, kept=checks.mapping(me, "kept", self.kept, KeptProfile))
        for name in self.kept:
            if name not in get_args(StoreFormat):
                refuse(me, f"kept/{name}", "found an unknown format", ", ".join(get_args(StoreFormat)))
        if self.channels is not None:
            put(self, channels=checks.array(me, "channels", self.channels, np.float64, which=2, channel=None))
            _demand(me, "channels", self.channels, (self.channels > 0) | [[True], [False]], "spreads above 0", _WHICH)
        if (self.residual is None) != (self.residual_ratio is None):
            refuse(me, "residual_ratio", "found without residual, or residual without it", "both or neither")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenoiserProfile(Record):
    """The measured sites of one denoiser.

    Attributes:
        class_name: Class of the network.
        config_digest: sha256 of its configuration. None if it has none.
        sites: ``model``, ``stack:PATH``, ``block:PATH`` or ``sublayer:PATH`` -> its measurements; at least one.

    Raises:
        DocumentError: If a field is not valid.
    """

    class_name: str
    config_digest: str | None = None
    sites: Mapping[str, SiteProfile]

    def __post_init__(self) -> None:
        me = type(self).__name__
        checks.text(me, "class_name", self.class_name)  # a schedule allows None here, a profile does not
        check_network(me, self.class_name, self.config_digest)
        put(self, sites=checks.named(me, "sites", self.sites, SiteProfile, checks.site))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dynamics(Record):
    """The propagation of errors in the sampling loop.

    m_i is the guided output that the full run passes to its i-th step.

    Attributes:
        grams: float64 [N, T, T], ⟨m_i, m_j⟩ per element, sample by sample; symmetric.
        peaks: float64 [N], range (largest less smallest element) of each sample's final state.
        reach: float64 [T, T], at [i, j]: change of the state after step i per unit of change of m_j, through the noise
            scheduler alone; 0 for j > i.
        response: float64 [T], the factor by which a state's error e appears in the network's output: m(x + e) ≈ m(x) +
            response · e. It is the median over the samples.
        spread: float64 [T], the rest of the output's error, ‖m(x + e) − m(x) − response · e‖² / ‖e‖². It is the median
            over the samples.

    Raises:
        DocumentError: If a field is not valid.
    """

    grams: np.ndarray
    peaks: np.ndarray
    reach: np.ndarray
    response: np.ndarray
    spread: np.ndarray

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, response=checks.array(me, "response", self.response, np.float64, step=None))
        put(self, spread=checks.array(me, "spread", self.spread, np.float64, step=len(self.response)))
        _demand(me, "spread", self.spread, self.spread >= 0, "0 or more")
        put(self, peaks=checks.array(me, "peaks", self.peaks, np.float64, sample=None))
        _demand(me, "peaks", self.peaks, self.peaks >= 0, "0 or more", ("sample",))
        steps, samples = len(self.response), len(self.peaks)
        axes = {"sample": samples, "step": steps, "other": steps}
        put(self, grams=checks.array(me, "grams", self.grams, np.float64, **axes))
        put(self, reach=checks.array(me, "reach", self.reach, np.float64, step=steps, other=steps))
        _demand(me, "grams", self.grams, (np.eye(steps) == 0) | (self.grams >= 0), "0 or more on the diagonal", axes)
        size = np.sqrt(np.diagonal(self.grams, axis1=1, axis2=2))
        _demand_symmetry(me, "grams", self.grams, size[:, :, None] * size[:, None, :], axes)
        later = np.triu(np.ones((steps, steps), bool), 1)
        _demand(me, "reach", self.reach, ~later | (self.reach == 0), "0 where other > step: it comes later")

    @property
    def gram(self) -> np.ndarray:
        """The mean of ``grams`` over the samples, float64 [T, T]."""
        return np.asarray(self.grams.mean(0))


def _from_version_1(tree: Tree) -> None:
    """Convert the JSON of version 1, with one guidance scale, in place."""
    upgrade_guidance(tree)
    _from_version_2(tree)


def _from_version_2(tree: Tree) -> None:
    """Convert the JSON of version 2, of a loop that ends on the last step of the grid, in place."""
    if "after" in tree:
        refuse("profile", "after", "the field is unknown", "in version 3")
    tree["after"] = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Profile(Document):
    """The measurements of a pipeline in full runs.

    Attributes:
        steps: Number of iterations of the sampling loop.
        start: Steps of the noise scheduler's grid before the first step of the loop. It is above 0 for image to image.
        after: Steps of the grid after the last step of the loop. It is above 0 for loops that end early.
        timesteps: float64 [T], the timesteps of the loop.
        sigmas: float64 [T + 1], the noise levels, the last one at the end of the loop. None if there are none.
        denoisers: Name of a pipeline component -> its measurements; at least one.
        noise_scheduler: The noise scheduler of the loop. None if unknown.
        guidance: The guidance of the runs. None if unknown.
        dynamics: The propagation of errors. None if the loop could not be repeated without its pipeline.
        seconds: Time of one full sampling loop with all denoiser calls, in seconds. 0 if not measured.
        samples: Number of calibration runs in the means.
        provenance: Free text by key: prompts, seeds, device, versions.

    Raises:
        DocumentError: If a field is not valid.

    Example:
        >>> profile = diffcache.measure(pipe, prompts, num_inference_steps=28)
        >>> profile
        <Profile 28 steps, 16 samples, FluxTransformer2DModel, sites: model>
        >>> profile.save("profile.safetensors")
        >>> profile = diffcache.Profile.load("profile.safetensors")
    """

    FORMAT: ClassVar[str] = "diffcache.profile"
    VERSION: ClassVar[int] = 3
    FILENAME: ClassVar[str] = "profile.safetensors"
    OLDER: ClassVar[Mapping[int, Upgrade]] = MappingProxyType({1: _from_version_1, 2: _from_version_2})
    ADVICE: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "diffcache.schedule": "The file is a schedule and needs no planning. Pass it to diffcache.accelerate, or "
            "measure a profile: diffcache profile MODEL."
        }
    )

    steps: int
    start: int = 0
    after: int = 0
    timesteps: np.ndarray
    sigmas: np.ndarray | None = None
    denoisers: Mapping[str, DenoiserProfile]
    noise_scheduler: NoiseSchedulerId | None = None
    guidance: Guidance | None = None
    dynamics: Dynamics | None = None
    seconds: float = 0.0
    samples: int
    provenance: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def _lower(cls, tree: Tree) -> int:
        """Convert JSON of a loop that ends on the last step of the grid to that of version 2, in place."""
        if tree["after"]:
            return cls.VERSION
        del tree["after"]
        return 2

    @property
    def grid_steps(self) -> int:
        """The number of steps of the noise scheduler's grid."""
        return self.start + self.steps + self.after

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("steps", "samples"):
            put(self, **{name: checks.count(me, name, getattr(self, name), least=1)})
        for name in ("start", "after"):
            put(self, **{name: checks.count(me, name, getattr(self, name), least=0)})
        put(self, seconds=checks.real(me, "seconds", self.seconds, least=0))
        put(self, timesteps=checks.array(me, "timesteps", self.timesteps, np.float64, step=self.steps))
        if self.sigmas is not None:
            put(self, sigmas=checks.array(me, "sigmas", self.sigmas, np.float64, step=self.steps + 1))
            _demand(me, "sigmas", self.sigmas, self.sigmas >= 0, "0 or more")
        put(self, denoisers=checks.named(me, "denoisers", self.denoisers, DenoiserProfile, checks.component))
        put(self, provenance=checks.notes(me, "provenance", self.provenance))
        check_circumstances(me, self.noise_scheduler, self.guidance)
        if self.dynamics is not None:
            steps = len(checks.instance(me, "dynamics", self.dynamics, Dynamics).response)
            if steps != self.steps:
                refuse(me, "dynamics/response", f"{steps} steps", f"{self.steps}, the steps of the profile")
        for name, denoiser in self.denoisers.items():
            for site, found in denoiser.sites.items():
                branches, steps, _ = found.output.l1.shape
                at = f"{name}/{site}/output/l1"
                if steps != self.steps:
                    refuse(me, at, f"{steps} steps", f"{self.steps}, the steps of the profile")
                check_branches(me, at, branches, self.guidance)

    def describe(self) -> str:
        """Return the measurements as text for readers, with one line per site."""
        lines = [f"{self.steps} steps, {self.samples} samples"]
        for name, denoiser in self.denoisers.items():
            lines.append(f"{name} ({denoiser.class_name})")
            width = max(map(len, denoiser.sites))
            for site, found in denoiser.sites.items():
                drift = np.diagonal(found.output.relative_l1, offset=-1, axis1=1, axis2=2)
                change = f"changes {drift.mean():.3g} per step, " if drift.size else ""
                cost = f"{1e3 * found.seconds:.3g} ms, {found.flops / 1e9:.3g} GFLOP, {found.output_bytes} bytes"
                cost += f", {found.calls} times a step" if found.calls > 1 else ""
                energy = found.output.energy.mean()
                off = [f"{100 * (k.error / energy) ** 0.5:.2g} % in {n}" for n, k in found.kept.items() if energy]
                cost += f", off by {', '.join(off)}" if off else ""
                lines.append(f"  {site:{width}}  {change}{cost}")
        lines += [_note(key, value) for key, value in spoken(self.provenance).items()]
        return "\n".join(map(printable, lines))

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        networks = dict.fromkeys(denoiser.class_name for denoiser in self.denoisers.values())
        sites = dict.fromkeys(site.partition(":")[0] for found in self.denoisers.values() for site in found.sites)
        counted = f"{self.steps} steps, {self.samples} sample{'s' * (self.samples != 1)}"
        return printable(f"<Profile {counted}, {', '.join(networks)}, sites: {', '.join(sites)}>")

    def _repr_html_(self) -> str:
        """Return the measurements as HTML, for notebooks."""
        return card("Profile", self.describe())


def _note(key: str, value: str) -> str:
    if key == "influence_steps":
        return f"influence measured at step{'s' if ',' in value else ''} {value}"
    return f"{key}: {value}"


def _demand(
    where: str, name: str, table: np.ndarray, holds: np.ndarray, allowed: str, axes: Iterable[str] = ()
) -> None:
    """Raise DocumentError, naming the first element, unless all elements of ``holds`` are true."""
    if index := first(~holds):
        found = f"{index_text(axes or AXES[table.ndim], index)} is {table[index]:g}"
        refuse(where, name, found, allowed)


def _demand_symmetry(where: str, name: str, table: np.ndarray, size: np.ndarray, axes: Iterable[str] = ()) -> None:
    """Raise DocumentError unless ``table`` is symmetric within SYMMETRY · ``size``."""
    mirror = np.swapaxes(table, -1, -2)
    if index := first(np.abs(table - mirror) > SYMMETRY * size):
        found = f"{index_text(axes or AXES[table.ndim], index)} is {table[index]:g}, its mirror image {mirror[index]:g}"
        refuse(where, name, found, "the same on both sides", f"Average them: ({name} + {name}ᵀ) / 2.")
