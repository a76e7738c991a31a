"""Criteria: one file, one criterion; it decides in the run whether a step that the plans predict is predicted.

A file holds two names:

    ABOUT                     an ``About``: where the decision is taken, and what the change is measured from
    change(signal, memory)    the relative change of a ``Signal``, a tensor of one element

It may hold five more. Each default is what the criterion does without the function:

    signal(tensors)           the tensors to compare, made from those at ``ABOUT.where``; default: these tensors
    ready(memory)             whether the criterion can compare yet; default: always
    observe(memory, x, output)
                              called after the denoiser has computed ``output`` from ``x``; default: nothing
    keeps(x, output)          the tensors that ``observe`` keeps, for the estimate of memory; default: none
    check(online)             raises for values of ``online`` that the criterion cannot use; default: accepts all

``memory`` is a ``Memory``, one for each branch of guidance. The executor does the rest: it keeps the signal, puts the
change through ``Online.polynomial``, adds changes up where ``ABOUT.accumulates`` says so, and compares the level with
``Online.limit`` and the number of steps in a row with ``Online.most``.

The name of the file is ``Online.rule``, in code and in schedule files. A criterion of another package is named
``"package.module:attribute"``: the object there (a module, a class or an instance) holds the same names. Such a name
works in code alone. A schedule file that holds one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcache import registry
from diffcache.documents.schedule import DenoiserPlan, Online
from diffcache.errors import UnknownName
from diffcache.executor.criteria._about import PARAMETERS, About, Where
from diffcache.executor.criteria._signal import Memory, Signal, distance, size

__all__ = [
    "PARAMETERS",
    "About",
    "Criterion",
    "Memory",
    "Signal",
    "Where",
    "available",
    "deciding_at",
    "distance",
    "load",
    "of",
    "size",
]

Tensors = Sequence[Tensor]
OPTIONAL = ("signal", "ready", "observe", "keeps", "check")


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _always(memory: Memory) -> bool:
    return True


def _ignore(memory: Memory, x: Tensors, output: Tensors) -> None:
    pass


def _nothing(x: Tensors, output: Tensors) -> Tensors:
    return ()


def _accept(online: Online) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Criterion:
    """A loaded criterion: what its file holds, and the defaults of what it leaves out."""

    name: str
    about: About
    change: Callable[[Signal, Memory], Tensor]
    signal: Callable[[Tensors], Tensors] = _same
    ready: Callable[[Memory], bool] = _always
    observe: Callable[[Memory, Tensors, Tensors], None] = _ignore
    keeps: Callable[[Tensors, Tensors], Tensors] = _nothing
    check: Callable[[Online], None] = _accept


def available() -> tuple[str, ...]:
    """Return the names of the criteria in this folder, sorted."""
    return registry.names(__name__)


def load(name: str) -> Criterion:
    """Return the criterion called ``name``, or the one at ``"package.module:attribute"``.

    Args:
        name: From code. A schedule that is read from a file never holds an address (see ``CacheSchedule.check_file``).

    Raises:
        UnknownName: There is no such criterion, or the object at the address is none.
    """
    found: Any = registry.load(__name__, name, kind="criterion")
    about, change = getattr(found, "ABOUT", None), getattr(found, "change", None)
    if not isinstance(about, About) or not callable(change):
        raise UnknownName(
            "criterion",
            name,
            available(),
            next_step="A criterion has ABOUT, an About, and change(), a function.",
        )
    more = {part: getattr(found, part) for part in OPTIONAL if hasattr(found, part)}
    return Criterion(name, about, change, **more)


def of(plan: DenoiserPlan | None) -> Criterion | None:
    """Return the criterion of a denoiser's plan, or None if the plan leaves nothing to the run.

    Raises:
        UnknownName: The plan names a criterion that does not exist.
    """
    return None if plan is None or plan.online is None else load(plan.online.rule)


def deciding_at(where: Where) -> tuple[str, ...]:
    """Return the names of the criteria in this folder that decide at ``where``, sorted."""
    return tuple(name for name in available() if load(name).about.where is where)
