"""Arguments of calls: the names that a function takes, and the steps that a call asks for."""

from __future__ import annotations

import copy
import inspect
import math
from numbers import Integral
from typing import Any

STEPS = "num_inference_steps"
GRIDS = ("timesteps", "sigmas")  # arguments that replace the noise scheduler's own grid

Parameters = dict[str, inspect.Parameter]


def is_count(value: object, least: int, most: float = math.inf) -> bool:
    """Return whether ``value`` is a whole number between the two. ``True`` and ``False`` are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def parameters_of(function: Any, leave_out: int = 0) -> Parameters | None:
    """Return the parameters of a function by name, or None if it takes any keyword or has no signature.

    Args:
        function: The function.
        leave_out: The number of parameters to leave out at the beginning, such as ``self``.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[leave_out:]
    except (TypeError, ValueError):  # a callable without a signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def with_optional(parameters: Parameters | None, *names: str) -> Parameters | None:
    """Return ``parameters`` and these optional keywords; None if ``parameters`` is None."""
    if parameters is None:
        return None
    kind = inspect.Parameter.KEYWORD_ONLY
    return parameters | {name: inspect.Parameter(name, kind, default=None) for name in names}


def planned(scheduler: Any, steps: int) -> int | None:
    """Return the iterations that a noise scheduler plans for ``steps``, or None if they depend on its pipeline."""
    for options in ({}, {"mu": 1.0}):  # a shift that depends on the resolution; the number of iterations does not
        tried = copy.deepcopy(scheduler)
        try:
            tried.set_timesteps(steps, **options)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, AssertionError):
            continue  # the scheduler needs values that its pipeline computes
        return len(tried.timesteps)
    return None
