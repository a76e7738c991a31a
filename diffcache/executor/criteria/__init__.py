"""Criteria, one per file: each decides in the run whether a step that the plans predict is predicted.

A file holds two names:

* ``ABOUT``: an ``About``, which describes where the decision is taken and how the change is measured.
* ``change(signal, memory)``: returns the relative change of a ``Signal``, a 0-d tensor. It is 0 or more, and exactly 0
  for equal tensors in every dtype.

It may hold five more functions:

* ``signal(tensors)``: returns the tensors to compare, made from those at ``ABOUT.where``. By default it returns these
  tensors.
* ``ready(memory)``: returns whether the criterion can compare yet. The default is True.
* ``observe(memory, x, output)``: is called after the denoiser has computed ``output`` from ``x``. By default it does
  nothing.
* ``keeps(x, output)``: returns the tensors that ``observe`` keeps, for the estimate of memory. By default there are
  none.
* ``check(online)``: raises for values of ``online`` that the criterion cannot use. By default it accepts all.

Keyword-only arguments of these functions are the options of the criterion: ``def change(signal, memory, *, gamma: float
= 0.9)``. A default is a number or text, and its type is that of the option. ``Online.options`` sets them by name, and a
schedule file holds them. ``check`` sees the value of every option in ``online.options``.

``ABOUT.levels`` states that ``change`` reads ``Signal.levels``, the share of noise in the state at every step.
``Signal.since`` is the step of the reference call.

``memory`` is a ``Memory``, one for each branch of guidance. The executor keeps the signal, applies
``Online.polynomial`` to the change, adds changes up if ``ABOUT.accumulates`` is set, and compares the result with
``Online.limit`` and the number of steps in a row with ``Online.most``.

The name of the file is ``Online.rule``, in code and in schedule files. A criterion of another package is named
``"package.module:attribute"``: the object there (a module, a class or an instance) holds the same names. Such a name
works in code alone. A schedule file that holds one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from diffcache import registry
from diffcache.documents.schedule import DenoiserPlan, Online
from diffcache.errors import UnknownName
from diffcache.executor.criteria._about import PARAMETERS, TIME_EMBEDDING, About, Where
from diffcache.executor.criteria._options import Option, bound, completed, declared
from diffcache.executor.criteria._signal import Memory, Signal, distance, size

__all__ = [
    "PARAMETERS",
    "TIME_EMBEDDING",
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
    """Return the tensors: the default of ``signal``."""
    return tensors


def _always(memory: Memory) -> bool:
    """Return True: the default of ``ready``."""
    return True


def _ignore(memory: Memory, x: Tensors, output: Tensors) -> None:
    """Do nothing: the default of ``observe``."""
    pass


def _nothing(x: Tensors, output: Tensors) -> Tensors:
    """Return no tensors: the default of ``keeps``."""
    return ()


def _accept(online: Online) -> None:
    """Accept every value: the default of ``check``."""
    pass


@dataclass(frozen=True, slots=True)
class Criterion:
    """A loaded criterion: the names in its file, and defaults for those that are missing.

    Attributes:
        name: The name of its file, or its address.
        about: Where the decision is taken and how the change is measured.
        change: Returns the relative change of a signal, a tensor of one element.
        signal: Returns the tensors to compare.
        ready: Returns whether the criterion can compare yet.
        observe: Called after the denoiser has computed.
        keeps: Returns the tensors that ``observe`` keeps.
        check: Raises for values of ``Online`` that the criterion cannot use.
        options: The value of every option. The functions already have them.
    """

    name: str
    about: About
    change: Callable[[Signal, Memory], Tensor]
    signal: Callable[[Tensors], Tensors] = _same
    ready: Callable[[Memory], bool] = _always
    observe: Callable[[Memory, Tensors, Tensors], None] = _ignore
    keeps: Callable[[Tensors, Tensors], Tensors] = _nothing
    check: Callable[[Online], None] = _accept
    options: Mapping[str, Option] = field(default_factory=dict)


def available() -> tuple[str, ...]:
    """Return the names of the criteria in this folder, sorted."""
    return registry.names(__name__)


def load(name: str, options: Mapping[str, Option] = MappingProxyType({})) -> Criterion:
    """Return the criterion called ``name``, or the one at ``"package.module:attribute"``.

    Args:
        name: From code. A schedule that is read from a file never holds an address (see ``CacheSchedule.check_file``).
        options: Option -> value. Missing ones have their defaults.

    Raises:
        UnknownName: There is no such criterion, the object at the address is none, or it has not one of ``options``.
        BadOption: The value of an option is not of its type.
        Unusable: The criterion declares an option that no file can hold.
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
    parts = {part: getattr(found, part) for part in ("change", *OPTIONAL) if hasattr(found, part)}
    values = completed(name, declared(name, parts.values()), options)
    return Criterion(name, about, **{part: bound(function, values) for part, function in parts.items()}, options=values)


def of(plan: DenoiserPlan | None) -> Criterion | None:
    """Return the criterion of a denoiser's plan, or None if the plan leaves no decision to the run.

    Raises:
        UnknownName: The plan names a criterion, or an option of it, that does not exist.
        BadOption: The value of an option is not of its type.
    """
    return None if plan is None or plan.online is None else load(plan.online.rule, plan.online.options)


def deciding_at(where: Where) -> tuple[str, ...]:
    """Return the names of the criteria in this folder that decide at ``where``, sorted."""
    return tuple(name for name in available() if load(name).about.where is where)
