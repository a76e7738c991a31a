"""Define the budget of a plan: a goal for its cost or its error, and a limit on memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real

from diffcache.documents.checks import put
from diffcache.errors import BadOption, Unusable

_GOALS = ("computed_steps", "speedup", "min_psnr_db")


@dataclass(frozen=True, slots=True, init=False)
class Budget:
    """One goal, and optionally a limit on memory.

    Args:
        computed_steps: See the attribute.
        speedup: See the attribute.
        min_psnr_db: See the attribute.
        memory_bytes: See the attribute.
        max_error_db: Former name of ``min_psnr_db``. It still works; use the new name.

    Attributes:
        computed_steps: Work of a plan in full steps of the loop. Fractions are for tables of sites: their work may be
            a fraction of a step.
        speedup: Speed-up of the sampling loop over the full run, 1 or more, by the seconds that the profile measured.
        min_psnr_db: Least expected fidelity to the full run, PSNR of the final state in dB. The plan is the cheapest
            one that reaches it.
        memory_bytes: Most bytes of kept tensors at one time, for the batch size of the profile.

    Raises:
        BadOption: If there is not exactly one goal, or a value is out of range.

    Example:
        >>> schedule = diffcache.optimize(pipe, prompts, diffcache.Budget(min_psnr_db=40), num_inference_steps=28)
        >>> schedule = diffcache.plan(profile, "closed_loop", diffcache.Budget(speedup=2.5, memory_bytes=2**30))
    """

    computed_steps: float | None
    speedup: float | None
    min_psnr_db: float | None
    memory_bytes: int | None

    def __init__(
        self,
        computed_steps: float | None = None,
        speedup: float | None = None,
        min_psnr_db: float | None = None,
        memory_bytes: int | None = None,
        *,
        max_error_db: float | None = None,
    ) -> None:
        if min_psnr_db is not None and max_error_db is not None:
            raise BadOption("max_error_db", max_error_db, "min_psnr_db alone: it is the new name of the same goal")
        put(
            self,
            computed_steps=computed_steps,
            speedup=speedup,
            min_psnr_db=max_error_db if min_psnr_db is None else min_psnr_db,
            memory_bytes=memory_bytes,
        )
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise Unusable(
                "budget",
                f"it sets {self}",
                f"Set exactly one of {', '.join(_GOALS)}. You may add memory_bytes",
            )
        _demand("computed_steps", self.computed_steps, least=1, allowed="1 or more")
        _demand("speedup", self.speedup, least=1, allowed="1 or more; 1 is the full run")
        name = "min_psnr_db" if max_error_db is None else "max_error_db"
        _demand(name, self.min_psnr_db, least=-math.inf, allowed="a number of dB, such as 40")
        if self.memory_bytes is not None and (
            not isinstance(self.memory_bytes, Integral) or isinstance(self.memory_bytes, bool) or self.memory_bytes < 0
        ):
            raise BadOption("memory_bytes", self.memory_bytes, "a whole number of bytes, 0 or more")

    @property
    def max_error_db(self) -> float | None:
        """Return ``min_psnr_db`` under its former name."""
        return self.min_psnr_db

    @classmethod
    def of(cls, budget: Budget | float) -> Budget:
        """Return ``budget``, or a number as a Budget with these ``computed_steps``."""
        return budget if isinstance(budget, Budget) else cls(computed_steps=budget)

    def check(self, steps: int | None, *, whole: bool = False) -> None:
        """Raise BadOption if no plan for a loop of ``steps`` steps can meet the goal.

        Args:
            steps: Number of iterations of the loop. None: any number.
            whole: Whether each step is computed either in full or not at all, so that fractions are not valid.
        """
        most = "the steps of the loop" if steps is None else f"{steps}, the steps of the loop"
        count = self.computed_steps
        if count is not None and ((whole and count != int(count)) or (steps is not None and count > steps)):
            kind = "whole numbers from 1" if whole else "1"
            why = ": the whole network is computed at a step, or not at all" if whole and count != int(count) else ""
            raise BadOption("computed_steps", count, f"{kind} to {most}{why}")
        if self.speedup is not None and steps is not None and self.speedup > steps:
            raise BadOption("speedup", self.speedup, f"up to {steps}, with one computed step of {steps}")

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = ((name, f"{v:g}" if isinstance(v, float) else str(v)) for name, v in values if v is not None)
        return ", ".join(f"{name} {value}" for name, value in shown) or "nothing"


def check_seconds(name: str, value: object) -> None:
    """Raise BadOption unless ``value`` is None or a number of seconds."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= float(value) < math.inf):  # type: ignore[arg-type]
        raise BadOption(name, value, "a number of seconds, 0 or more, or None")


def _demand(name: str, value: object, *, least: float, allowed: str) -> None:
    if value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least:  # type: ignore[operator]
        raise BadOption(name, value, allowed)
