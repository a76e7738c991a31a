"""Define the schedule, the document that states the action of every site at every step. Pure data, numpy only.

At a step that is not computed, a site's output is predicted from its anchors (the newest computed steps a_0 > a_1 > …)
by the one equation of this library:

    F̂_i = s_i ⊙ ( Σ_k (w_{i,k} · F_{a_k} + v_{i,k} · x_{a_k}) + κ_i · (x_i − x_{a_0}) ) + b_i              (1)

Shapes in this file: T steps of the sampling loop, B branches with separate coefficients (1: shared by all), K anchors,
C channels. Every class checks its fields when it is made, in code or from a file, and raises DocumentError. Arrays
become read-only copies; mappings become read-only and sorted. A file cannot run code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

import numpy as np

from diffcache.documents import checks
from diffcache.documents.branches import BranchLayout, GuidanceMode, names_in
from diffcache.documents.checks import first, index_text, put, refuse
from diffcache.documents.circumstances import (
    NO_NOISE_SCHEDULER,
    Guidance,
    NoiseSchedulerId,
    check_branches,
    check_circumstances,
    check_network,
    noise_scheduler_title,
    upgrade_guidance,
)
from diffcache.documents.document import Document, Record, Tree, Upgrade, spoken
from diffcache.documents.expected import MOST_DB, Expected, Origin, decibels, most_db
from diffcache.documents.sites import GRANULARITIES, parse
from diffcache.errors import BadOption
from diffcache.text import card, printable

__all__ = [
    "MOST_DB",
    "NO_NOISE_SCHEDULER",
    "STORES",
    "CacheSchedule",
    "DenoiserPlan",
    "Expected",
    "Guidance",
    "GuidanceMode",
    "NoiseSchedulerId",
    "Online",
    "Origin",
    "SitePlan",
    "StoreFormat",
    "check_branches",
    "check_circumstances",
    "check_network",
    "check_store",
    "decibels",
    "most_db",
    "noise_scheduler_title",
    "upgrade_guidance",
]

StoreFormat = Literal["bf16", "int8", "fp8", "int4"]
STORES: Mapping[str, StoreFormat | None] = {"exact": None, **{name: name for name in get_args(StoreFormat)}}
SMALLEST_SPREAD = 2.0**-126  # below it, float32 loses bits and becomes 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SitePlan(Record):
    """The plan of one site: the steps at which it computes, and the coefficients of equation (1) for the other steps.

    No coefficient is larger than ``checks.MOST``. At computed steps, kappa, scale and bias have no effect. A prediction
    that is zero for all anchors is not allowed.

    Attributes:
        compute: bool [T]. The first step is always computed.
        weights: float64 [B, T, K], w of equation (1). It is zero at computed steps and for anchors that do not exist
            yet.
        kappa: float64 [B, T], κ of equation (1). None: 0.
        inputs: float64 [B, T, K], v of equation (1), the weights of the anchors' inputs. It is zero where weights must
            be. None: 0.
        scale: float64 [B, T] or [B, T, C], s of equation (1). None: 1.
        bias: float64 [B, T] or [B, T, C], b of equation (1). None: 0.
        store: Format in which outputs are kept. None: as the site returns them.
        prescale: float64 [2, C], centre and spread of every channel. They are removed before quantisation and restored
            after it. None: not used.

    Raises:
        DocumentError: If a field is not valid.
    """

    compute: np.ndarray
    weights: np.ndarray
    kappa: np.ndarray | None = None
    inputs: np.ndarray | None = None
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    store: StoreFormat | None = None
    prescale: np.ndarray | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        compute = checks.array(me, "compute", self.compute, bool, step=None)
        weights = checks.coefficients(me, "weights", self.weights, branch=None, step=len(compute), anchor=None)
        put(self, compute=compute, weights=weights)
        rows = {"branch": len(weights), "step": len(compute)}
        if self.kappa is not None:
            put(self, kappa=checks.coefficients(me, "kappa", self.kappa, **rows))
        if self.inputs is not None:
            put(self, inputs=checks.coefficients(me, "inputs", self.inputs, **rows, anchor=weights.shape[2]))
        channels = None
        for name in ("scale", "bias"):
            value = getattr(self, name)
            if np.ndim(value) > len(rows):
                value = checks.coefficients(me, name, value, **rows, channel=channels)
                channels = value.shape[-1]
                put(self, **{name: value})
            elif value is not None:
                put(self, **{name: checks.coefficients(me, name, value, **rows)})
        if self.store is not None and self.store not in get_args(StoreFormat):
            refuse(me, "store", f"found {self.store!r:.80}", ", ".join(map(repr, get_args(StoreFormat))) + " or null")
        if self.prescale is not None:
            put(self, prescale=checks.coefficients(me, "prescale", self.prescale, which=2, channel=None))
            if index := first(self.prescale[1] < SMALLEST_SPREAD):
                found = f"the spread of channel {index[0]} is {self.prescale[1][index]:g}"
                refuse(me, "prescale", found, f"spreads above 0, at least {SMALLEST_SPREAD:.3g}: it is divided by them")
        _check_anchors(me, "weights", compute, weights)
        if self.inputs is not None:
            _check_anchors(me, "inputs", compute, self.inputs)
        if index := first(~compute & ~self._speaks()):
            found = f"{index_text(rows, index)} is predicted, with all coefficients zero"
            refuse(me, "weights", found, "a prediction other than zero")

    def on_grid(self, before: int, after: int) -> SitePlan:
        """Return the plan for a longer grid, of which the loop enters only the steps of this plan.

        Args:
            before: Number of steps before the loop, which starts late (image to image). They count as computed.
            after: Number of steps after the loop, which ends early. They count as computed.
        """
        if not before and not after:
            return self

        def padded(array: np.ndarray, value: float = 0.0) -> np.ndarray:
            widths = [(0, 0), (before, after), *[(0, 0)] * (array.ndim - 2)]
            return np.pad(array, widths, constant_values=value)

        return dataclasses.replace(
            self,
            compute=np.pad(self.compute, (before, after), constant_values=True),
            weights=padded(self.weights),
            kappa=None if self.kappa is None else padded(self.kappa),
            inputs=None if self.inputs is None else padded(self.inputs),
            scale=None if self.scale is None else padded(self.scale, 1.0),
            bias=None if self.bias is None else padded(self.bias),
        )

    @property
    def steps_computed(self) -> int:
        """The number of computed steps."""
        return int(self.compute.sum())

    @property
    def anchors(self) -> int:
        """The largest number of newest outputs that are needed at once: 0 if nothing is predicted, else at least 1."""
        if self.compute.all():
            return 0
        used = np.flatnonzero(self.refers.any(axis=0))
        return int(used[-1]) + 1 if len(used) else 1

    @property
    def refers(self) -> np.ndarray:
        """Whether the step's prediction uses that anchor in any branch, bool [T, K]."""
        used = self.weights != 0 if self.inputs is None else (self.weights != 0) | (self.inputs != 0)
        return np.asarray(used.any(axis=0))

    def anchors_by_step(self) -> dict[int, tuple[list[int], np.ndarray]]:
        """Return the anchors that each prediction uses.

        The newest anchor is included even if its weight is 0, because kappa refers to its input.

        Returns:
            Predicted step -> the indices of its anchors along K, and the steps of these anchors.
        """
        computed, refers = np.flatnonzero(self.compute), self.refers
        before = np.cumsum(self.compute)
        found = {}
        for step in np.flatnonzero(~self.compute).tolist():
            newest_first = computed[: before[step]][-self.weights.shape[2] :][::-1]
            used = [k for k in range(len(newest_first)) if k == 0 or refers[step, k]]
            found[step] = used, newest_first[used]
        return found

    @property
    def differences(self) -> np.ndarray:
        """The steps whose output F may be kept as F − x, the output less its input, without x itself, bool [T].

        These are the steps for which every prediction that refers to them is residual reuse, s ⊙ w (F + x_i − x) + b.
        """
        used, may = np.zeros(len(self.compute), bool), np.ones(len(self.compute), bool)
        for step, (_, anchors) in self.anchors_by_step().items():
            used[anchors] = True
            if self.inputs is not None and self.inputs[:, step].any():
                may[anchors] = False
            kappa = np.zeros(len(self.weights)) if self.kappa is None else self.kappa[:, step]
            if len(anchors) > 1 or not kappa.any() or not np.array_equal(kappa, self.weights[:, step, 0]):
                may[anchors] = False
        return used & may

    def _speaks(self) -> np.ndarray:
        """Return where equation (1) is not zero for all anchors, bool [B, T]."""
        speaks = _nonzero(self.weights)
        if self.kappa is not None:
            speaks |= _nonzero(self.kappa)
        if self.inputs is not None:
            speaks |= _nonzero(self.inputs)
        if self.scale is not None:
            speaks &= _nonzero(self.scale)
        if self.bias is not None:
            speaks |= _nonzero(self.bias)
        return speaks


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Online(Record):
    """A criterion that decides in the run which predicted steps are computed after all.

    The criterion is not called at steps that the plans compute. It compares the calls of one branch. A step is
    predicted while the change that it finds stays below ``limit``. A step is computed if the change is not finite.

    Attributes:
        rule: Name of the criterion: a file of ``executor/criteria``, "first_block" for instance; or, in code only,
            "package.module:attribute". Only the form is checked here. Whether the criterion exists and accepts these
            parameters is checked before a run begins.
        limit: float64 [T], relative. At 0 the step is computed.
        polynomial: float64 [P], highest power first, which is applied to each change. None: the change itself.
        most: Largest number of consecutive steps that may be predicted. None: any number.
        options: Option of the criterion -> number or text. Those that are missing have the criterion's defaults.

    Raises:
        DocumentError: If a field is not valid.
    """

    rule: str
    limit: np.ndarray
    polynomial: np.ndarray | None = None
    most: int | None = None
    options: Mapping[str, float | int | str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, rule=checks.plugin(me, "rule", self.rule))
        if np.ndim(self.limit) == 0 and isinstance(self.limit, (int, float, np.number, np.ndarray)):
            example = f"np.full(steps, {float(self.limit):g})"
            refuse(me, "limit", f"found {self.limit!s}", f"one number per step, for example {example}")
        put(self, limit=checks.array(me, "limit", self.limit, np.float64, step=None))
        if index := first(self.limit < 0):
            refuse(me, "limit", f"step {index[0]} is {self.limit[index]:g}", "0 or more")
        if self.polynomial is not None:
            put(self, polynomial=checks.array(me, "polynomial", self.polynomial, np.float64, power=None))
        if self.most is not None:
            put(self, most=checks.count(me, "most", self.most, least=1))
        put(self, options=checks.options(me, "options", self.options))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenoiserPlan(Record):
    """The plans of one denoiser's sites, and the network for which they were made.

    The criterion in ``online`` decides for all sites together. With a criterion that decides which steps are computed,
    plans may use the newest output only. This is checked before a run begins.

    Attributes:
        sites: ``model``, ``stack:PATH``, ``block:PATH`` or ``sublayer:PATH`` -> its plan; at least one.
        online: The criterion that decides in the run. None: no criterion.
        called: bool [T], steps at which the loop calls this denoiser. False before a late start (image to image), after
            an early end, and at the steps of another denoiser. None: not known; the plan fits any run.
        class_name: Class of the network. None: the plan fits any.
        config_digest: sha256 of its configuration. None: the plan fits any.

    Raises:
        DocumentError: If a field is not valid.
    """

    sites: Mapping[str, SitePlan]
    online: Online | None = None
    called: np.ndarray | None = None
    class_name: str | None = None
    config_digest: str | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        if self.online is not None:
            checks.instance(me, "online", self.online, Online)
        put(self, sites=checks.named(me, "sites", self.sites, SitePlan, checks.site))
        if self.called is not None:
            put(self, called=checks.array(me, "called", self.called, bool, step=None))
            if not self.called.any():
                refuse(me, "called", "found no step", "at least one step, or null")
        check_network(me, self.class_name, self.config_digest)


def _from_version_1(tree: Tree) -> None:
    """Convert the JSON of version 1, with one guidance scale and without the field ``called``, in place."""
    upgrade_guidance(tree)
    denoisers = tree.get("denoisers")
    for plan in denoisers.values() if isinstance(denoisers, dict) else ():
        if isinstance(plan, dict):
            plan.setdefault("called", None)
    _from_version_2(tree)


def _from_version_2(tree: Tree) -> None:
    """Convert the JSON of version 2, without the options of criteria, in place."""
    for name, online in _onlines(tree):
        if "options" in online:
            refuse("schedule", f"{name}/online/options", "the field is unknown", "in version 3")
        online["options"] = {}


def _onlines(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Yield the name and the JSON of each denoiser's criterion. The JSON may be damaged."""
    denoisers = tree.get("denoisers")
    for name, plan in denoisers.items() if isinstance(denoisers, dict) else ():
        if isinstance(plan, dict) and isinstance(plan.get("online"), dict):
            yield name, plan["online"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class CacheSchedule(Document):
    """All decisions of an accelerated run that are made offline.

    Where a site is predicted, no site inside it may be computed, because nothing inside it runs.

    Attributes:
        steps: Number of iterations of the sampling loop (not of ``scheduler.step`` evaluations in one iteration).
        denoisers: Name of a pipeline component -> its plan; at least one.
        noise_scheduler: The noise scheduler. None: the schedule fits any.
        guidance: The guidance. None: the schedule fits any, and no site has coefficients per branch.
        timesteps: float64 [T], the timesteps of the loop for which the schedule was made, or None.
        sigmas: float64 [T + 1], noise levels that never rise, which replace those of the noise scheduler. None: its
            own.
        expected: The fidelity that planning expects, or None.
        provenance: Free text by key: scheduler, budget, expected error, versions.

    Raises:
        DocumentError: If a field is not valid.

    Example:
        >>> schedule = diffcache.CacheSchedule.load("schedule.safetensors")
        >>> schedule
        <CacheSchedule 12 of 50 steps, FluxTransformer2DModel, 53.2 dB held out>
        >>> print(schedule)
    """

    FORMAT: ClassVar[str] = "diffcache.schedule"
    VERSION: ClassVar[int] = 3
    FILENAME: ClassVar[str] = "schedule.safetensors"
    OLDER: ClassVar[Mapping[int, Upgrade]] = MappingProxyType({1: _from_version_1, 2: _from_version_2})
    ADVICE: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "diffcache.schedule_set": "The file holds schedules for several numbers of steps. Take one out: "
            'ScheduleSet.load(path)[28].save("one.safetensors").',
            "diffcache.profile": "The file is a profile. Plan a schedule from it: diffcache plan FILE --computed 10.",
        }
    )

    steps: int
    denoisers: Mapping[str, DenoiserPlan]
    noise_scheduler: NoiseSchedulerId | None = None
    guidance: Guidance | None = None
    timesteps: np.ndarray | None = None
    sigmas: np.ndarray | None = None
    expected: Expected | None = None
    provenance: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def _lower(cls, tree: Tree) -> int:
        """Convert JSON without options of criteria to that of version 2, in place, and return the version."""
        onlines = list(_onlines(tree))
        if any(online["options"] for _, online in onlines):
            return cls.VERSION
        for _, online in onlines:
            del online["options"]
        return 2

    @property
    def layout(self) -> BranchLayout:
        """The branches of the coefficients."""
        layout = BranchLayout() if self.guidance is None else self.guidance.layout
        return dataclasses.replace(layout, names=names_in(self.provenance))

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, steps=checks.count(me, "steps", self.steps, least=1))
        put(self, denoisers=checks.named(me, "denoisers", self.denoisers, DenoiserPlan, checks.component))
        put(self, provenance=checks.notes(me, "provenance", self.provenance))
        check_circumstances(me, self.noise_scheduler, self.guidance)
        if self.timesteps is not None:
            put(self, timesteps=checks.array(me, "timesteps", self.timesteps, np.float64, step=self.steps))
        if self.sigmas is not None:
            put(self, sigmas=checks.array(me, "sigmas", self.sigmas, np.float64, step=self.steps + 1))
            if index := first(np.append(np.diff(self.sigmas) > 0, self.sigmas[-1] < 0)):
                found = f"step {index[0]} is {self.sigmas[index]:g}, the one after it higher, or the last below 0"
                refuse(me, "sigmas", found, "noise levels that never rise, 0 or more")
        if self.expected is not None:
            checks.instance(me, "expected", self.expected, Expected)
        for name, site, plan in self.plans():
            if (steps := len(plan.compute)) != self.steps:
                refuse(me, f"{name}/{site}/compute", f"{steps} steps", f"{self.steps}, the steps of the schedule")
            check_branches(me, f"{name}/{site}/weights", len(plan.weights), self.guidance)
        for name, denoiser in self.denoisers.items():
            _check_nesting(me, name, denoiser.sites)
            if denoiser.online is not None and (steps := len(denoiser.online.limit)) != self.steps:
                refuse(me, f"{name}/online/limit", f"{steps} steps", f"{self.steps}, the steps of the schedule")
            if denoiser.called is not None and (steps := len(denoiser.called)) != self.steps:
                refuse(me, f"{name}/called", f"{steps} steps", f"{self.steps}, the steps of the schedule")

    def check_file(self, where: str) -> None:
        """Raise DocumentError if a criterion is the address of an object in another package.

        A file must not name code to import.

        Args:
            where: Name of the document in errors.
        """
        for name, denoiser in self.denoisers.items():
            if denoiser.online is not None and ":" in denoiser.online.rule:
                refuse(
                    where,
                    f"{name}/online/rule",
                    f"found {denoiser.online.rule!r:.80}",
                    "the name of a criterion of diffcache; a file cannot name code to import",
                    "Make the schedule in code where it runs.",
                )

    def plans(self) -> Iterator[tuple[str, str, SitePlan]]:
        """Yield (name of a denoiser, name of a site, plan of the site) for every site."""
        for name, denoiser in self.denoisers.items():
            for site, plan in denoiser.sites.items():
                yield name, site, plan

    @property
    def called(self) -> np.ndarray:
        """The steps that the loop runs, bool [T]. All steps if a plan does not state when its denoiser is called."""
        return np.asarray(np.any([_called(plan, self.steps) for plan in self.denoisers.values()], axis=0))

    @property
    def computed_steps(self) -> int:
        """The number of steps that run and compute any site.

        With a ``model`` site, the network runs at these steps only.
        """
        computed = [
            plan.compute & _called(denoiser, self.steps)
            for denoiser in self.denoisers.values()
            for plan in denoiser.sites.values()
        ]
        return int(np.any(computed, axis=0).sum())

    @property
    def skips(self) -> bool:
        """Whether any site is predicted at a step at which its denoiser is called."""
        return any(
            bool((~plan.compute & _called(denoiser, self.steps)).any())
            for denoiser in self.denoisers.values()
            for plan in denoiser.sites.values()
        )

    def stored(self, how: str) -> CacheSchedule:
        """Return the schedule with every site's outputs kept in one format.

        If the format changes, the new schedule has no expected fidelity.

        Args:
            how: A format, or "exact": as the sites return them.

        Raises:
            BadOption: If there is no such format.
        """
        check_store(how)

        def kept(plan: SitePlan) -> SitePlan:
            return dataclasses.replace(plan, store=STORES[how])

        denoisers = {
            name: dataclasses.replace(denoiser, sites={site: kept(plan) for site, plan in denoiser.sites.items()})
            for name, denoiser in self.denoisers.items()
        }
        same = denoisers == self.denoisers
        return dataclasses.replace(self, denoisers=denoisers, expected=self.expected if same else None)

    def with_provenance(self, **entries: str) -> CacheSchedule:
        """Return the schedule with these entries of ``provenance`` added or replaced."""
        return dataclasses.replace(self, provenance={**self.provenance, **entries})

    def describe(self) -> str:
        """Return a summary for readers, with one strip per site: ■ computed, · predicted, blank if not called."""
        run = self.called
        own = np.flatnonzero(run)
        part = "" if run[[0, -1]].all() else f"; the loop runs steps {own[0]} to {own[-1]} of {self.steps}"
        nothing = "" if self.skips else "; nothing is skipped"
        lines = [f"{self.computed_steps} of {run.sum()} steps computed{part}{nothing}"]
        if self.noise_scheduler:
            lines.append(f"noise scheduler {noise_scheduler_title(self.noise_scheduler.class_name)}")
        if self.guidance:
            lines.append(f"guidance {self.guidance}")
        if self.expected:
            lines.append(f"expected {self.expected}")
        if self.sigmas is not None:
            lines.append("noise levels moved")
        for name, denoiser in self.denoisers.items():
            lines.append(name + (f" ({denoiser.class_name})" if denoiser.class_name else ""))
            if denoiser.online:
                given = "".join(f", {key} {value}" for key, value in denoiser.online.options.items())
                limit = f"limit {denoiser.online.limit.max():.3g}{given}"
                lines.append(f"  decided in the run by {denoiser.online.rule}, {limit}")
            width = max(map(len, denoiser.sites))
            for site, plan in denoiser.sites.items():
                called = _called(denoiser, self.steps)
                marks = np.where(called, np.where(plan.compute, "■", "·"), " ")
                kept = f" kept in {plan.store}" if plan.store else ""
                count = f"{int((plan.compute & called).sum())}/{int(called.sum())}"
                lines.append(f"  {site:{width}}  {count} {''.join(marks)}{kept}")
        lines += [f"{key}: {text}" for key, text in spoken(self.provenance).items()]
        return "\n".join(map(printable, lines))

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        networks = dict.fromkeys(plan.class_name or name for name, plan in self.denoisers.items())
        parts = [f"{self.computed_steps} of {self.called.sum()} steps", *networks]
        parts += [f"decided by {plan.online.rule}" for plan in self.denoisers.values() if plan.online]
        if self.expected:
            parts.append(f"{decibels(self.expected.mean_db)} {self.expected.origin.replace('-', ' ')}")
        if not self.skips:
            parts.append("nothing is skipped")
        return f"<CacheSchedule {printable(', '.join(parts))}>"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, for notebooks."""
        return card("CacheSchedule", self.describe())


def _called(plan: DenoiserPlan, steps: int) -> np.ndarray:
    """Return the steps at which the loop calls this denoiser, bool [steps]; all if the plan does not state them."""
    return np.ones(steps, bool) if plan.called is None else plan.called


def check_store(how: object) -> None:
    """Raise BadOption unless ``how`` is a format in which outputs can be kept, or "exact"."""
    if not isinstance(how, str) or how not in STORES:
        raise BadOption("store", how, ", ".join(map(repr, STORES)))


def _check_anchors(where: str, field: str, compute: np.ndarray, weights: np.ndarray) -> None:
    """Raise DocumentError unless every prediction refers only to steps that are computed before it."""
    axes = ("branch", "step", "anchor")
    if not compute[0]:
        refuse(where, "compute", "step 0 is predicted", "step 0 computed, because no output is kept before it")
    if index := first(compute[:, None] & (weights != 0)):
        found = f"{index_text(axes, index)} is {weights[index]:g} at a computed step"
        refuse(where, field, found, "0, for equation (1) is not used there")
    kept = np.cumsum(compute)  # at a predicted step i, the number of steps computed before it
    if index := first((weights != 0) & (np.arange(weights.shape[2]) >= kept[:, None])):
        found = f"{index_text(axes, index)} is {weights[index]:g}, with {kept[index[1]]} steps computed before"
        refuse(where, field, found, "0 for anchors that do not exist yet (0 is the newest)")


def _check_nesting(where: str, denoiser: str, plans: Mapping[str, SitePlan]) -> None:
    """Raise DocumentError if a site inside a predicted site is computed at the same step."""
    for inner, plan in plans.items():
        for outer in filter(plans.__contains__, _around(inner)):
            if index := first(plan.compute & ~plans[outer].compute):
                found = f"step {index[0]} is computed, but {outer!r} around it is predicted there"
                refuse(
                    where,
                    f"{denoiser}/{inner}/compute",
                    found,
                    "predicted at all steps at which a site around it is predicted",
                )


def _around(name: str) -> Iterator[str]:
    """Yield the names of all possible sites that contain a site."""
    site = parse(name)
    parts = site.path.split(".")
    if site.path:
        yield "model"
    for granularity in GRANULARITIES[1 : GRANULARITIES.index(site.granularity)]:
        yield from (f"{granularity}:{'.'.join(parts[:n])}" for n in range(1, len(parts) + 1))


def _nonzero(coefficients: np.ndarray) -> np.ndarray:
    """Return whether any coefficient along the axes after the second is not zero, bool [B, T]."""
    return np.asarray((coefficients != 0).any(axis=tuple(range(2, coefficients.ndim))))
