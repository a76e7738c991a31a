"""A site's plan, compiled for the run: at each step either compute, or the terms of equation (1) with their anchors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from diffcache.documents.checks import put
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, SitePlan, StoreFormat
from diffcache.executor import criteria

NEWEST = -1  # stands for the step of an anchor that is whatever was computed last


@dataclass(frozen=True, slots=True)
class Terms:
    """Equation (1) at one step. ``anchors`` are steps, newest first, or NEWEST alone; the other tuples hold one entry
    per branch. ``needs_x``: whether it refers to the site's input."""

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
        """Without scale and bias."""
        return dataclasses.replace(self, scale=(1.0,) * len(self.scale), bias=(0.0,) * len(self.bias))

    @property
    def anchors_with_x(self) -> tuple[int, ...]:
        """Those whose input is needed as well: of the newest, κ takes it off the input of now."""
        taken = [any(column) for column in zip(*self.inputs, strict=True)]
        taken[0] |= any(self.kappa)
        return tuple(a for a, with_x in zip(self.anchors, taken, strict=True) if with_x)


@dataclass(frozen=True, slots=True)
class Program:
    """``terms[i]`` is None where step i computes. ``keeps``: computed steps that a later step refers to;
    ``keeps_x``: those whose input is needed too; ``drops[i]``: anchors nobody refers to after step i.

    newest       which steps compute is decided in the run: ``terms`` say where they need not, and the newest output
                 takes the place of the one before
    differences  computed steps whose output less input says all that later steps need; kept so in fewer bytes
    store        format in which outputs are kept; None: as they are
    prescale     float64 [2, C] or None
    reads_x      whether some prediction needs the site's input
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
    """(denoiser, site) -> program."""
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
    """Equation (1) at a predicted step, with the anchors at indices ``used`` along K."""
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
    if array is None:
        return default
    value = array[branch, step]
    return value if value.ndim else float(value)
