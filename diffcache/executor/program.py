"""Compile the plan of a site for runs: for each step, either compute or the terms of equation (1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from diffcache.documents.checks import put
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, SitePlan, StoreFormat
from diffcache.executor import criteria

NEWEST = -1  # replaces a step number: the anchor is the output that was computed last


@dataclass(frozen=True, slots=True)
class Terms:
    """The coefficients of equation (1) at one step. All tuples but ``anchors`` have one entry per branch.

    Attributes:
        anchors: The steps of the anchors, newest first, or ``NEWEST`` alone.
        weights: The weights of the outputs of the anchors.
        inputs: The weights of the inputs of the anchors.
        kappa: The weight of the change of the input.
        scale: The scale of the prediction, a number or one per channel.
        bias: The bias of the prediction, a number or one per channel.
        needs_x: Whether the prediction refers to the input of the site.
    """

    anchors: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    inputs: tuple[tuple[float, ...], ...]
    kappa: tuple[float, ...]
    scale: tuple[float | np.ndarray, ...]
    bias: tuple[float | np.ndarray, ...]
    needs_x: bool = field(init=False)  # looked up in every forward

    def __post_init__(self) -> None:
        put(self, needs_x=any(self.kappa) or any(map(any, self.inputs)))

    @property
    def uncorrected(self) -> Terms:
        """Return the terms without scale and bias."""
        return dataclasses.replace(self, scale=(1.0,) * len(self.scale), bias=(0.0,) * len(self.bias))

    @property
    def anchors_with_x(self) -> tuple[int, ...]:
        """Return the anchors whose inputs are needed as well. κ needs the input of the newest."""
        taken = [any(column) for column in zip(*self.inputs, strict=True)]
        taken[0] |= any(self.kappa)
        return tuple(a for a, with_x in zip(self.anchors, taken, strict=True) if with_x)


@dataclass(frozen=True, slots=True)
class Program:
    """The compiled plan of one site.

    Attributes:
        terms: For each step, the terms of its prediction, or None if the step computes.
        keeps: The computed steps that a later step refers to.
        keeps_x: The computed steps with inputs that are needed too.
        drops: For each step, the anchors that no later step refers to.
        newest: Whether the run decides which steps compute. ``terms`` then holds the steps that may be predicted, and
            every computed output replaces the one before.
        differences: The computed steps of which the difference between output and input is kept in fewer bytes. Later
            steps need nothing else of them.
        store: The format in which outputs are kept. None keeps them as they are.
        prescale: float64 [2, C], or None.
        reads_x: Whether a prediction needs the input of the site.
    """

    terms: tuple[Terms | None, ...]
    keeps: frozenset[int]
    keeps_x: frozenset[int]
    drops: tuple[tuple[int, ...], ...]
    newest: bool = False
    differences: frozenset[int] = frozenset()
    store: StoreFormat | None = None
    prescale: np.ndarray | None = None
    reads_x: bool = field(init=False)

    def __post_init__(self) -> None:
        put(self, reads_x=any(t.needs_x for t in self.terms if t))


def compile_plan(plan: SitePlan, *, newest: bool = False) -> Program:
    """Compile the plan of one site.

    Args:
        plan: The plan.
        newest: Whether the run decides which steps compute. See ``Program``.
    """
    steps = len(plan.compute)
    anchors = plan.anchors_by_step()
    terms = tuple(_terms(plan, i, *anchors[i]) if i in anchors else None for i in range(steps))
    differences = frozenset(np.flatnonzero(plan.differences).tolist())
    last_use = {anchor: i for i, t in enumerate(terms) if t for anchor in t.anchors}
    if newest:
        asking = [i for i, t in enumerate(terms) if t]
        with_x = [i for i, t in enumerate(terms) if t and t.needs_x]
        return Program(
            terms=tuple(t and dataclasses.replace(t, anchors=(NEWEST,)) for t in terms),
            keeps=frozenset(range(max(asking, default=0))),
            keeps_x=frozenset(range(max(with_x, default=0))),
            drops=((),) * steps,
            newest=True,
            # Any step may come to be the anchor of any later prediction: all of them are alike, or none is kept so.
            differences=frozenset(range(steps)) if differences == last_use.keys() else frozenset(),
            store=plan.store,
            prescale=plan.prescale,
        )
    drops: list[list[int]] = [[] for _ in range(steps)]
    for anchor in sorted(last_use):
        drops[last_use[anchor]].append(anchor)
    keeps_x = frozenset(a for t in terms if t for a in t.anchors_with_x)
    return Program(
        terms, frozenset(last_use), keeps_x, tuple(map(tuple, drops)), False, differences, plan.store, plan.prescale
    )


def compile_schedule(schedule: CacheSchedule) -> dict[tuple[str, str], Program]:
    """Compile all plans of a schedule. Return the programs by denoiser and site."""
    return {
        (name, site): compile_plan(plan, newest=decides(denoiser))
        for name, denoiser in schedule.denoisers.items()
        for site, plan in denoiser.sites.items()
    }


def decides(plan: DenoiserPlan) -> bool:
    """Return whether the newest output of the run is the anchor, because a criterion decides which steps compute."""
    criterion = criteria.of(plan)
    return criterion is not None and not criterion.about.keeps_anchors


def _terms(plan: SitePlan, step: int, used: list[int], anchors: np.ndarray) -> Terms:
    """Return the terms of a predicted step.

    Args:
        plan: The plan of the site.
        step: The step.
        used: The indices along K of the anchors that the step uses.
        anchors: The steps of these anchors.
    """
    branches = len(plan.weights)
    weights = plan.weights[:, step]
    inputs = np.zeros_like(weights) if plan.inputs is None else plan.inputs[:, step]
    return Terms(
        anchors=tuple(anchors.tolist()),
        weights=tuple(map(tuple, weights[:, used].tolist())),
        inputs=tuple(map(tuple, inputs[:, used].tolist())),
        kappa=tuple(0.0 if plan.kappa is None else float(plan.kappa[b, step]) for b in range(branches)),
        scale=tuple(_at(plan.scale, b, step, 1.0) for b in range(branches)),
        bias=tuple(_at(plan.bias, b, step, 0.0) for b in range(branches)),
    )


def _at(array: np.ndarray | None, branch: int, step: int, default: float) -> float | np.ndarray:
    """Return a coefficient of one branch and step, a number or one per channel."""
    if array is None:
        return default
    value = array[branch, step]
    return value if value.ndim else float(value)
