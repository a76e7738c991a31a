"""Show the fits of a search as a progress bar: how many, the best so far, and what comes next."""

from __future__ import annotations

import math
from typing import Any, get_args

from tqdm import tqdm

from diffcache.documents.budget import Budget
from diffcache.documents.schedule import decibels
from diffcache.profiling.calibration.calibration import Phase
from diffcache.profiling.calibration.search import FITS, NEIGHBOURS, NUDGES
from diffcache.profiling.fitting.fit import Fit

PHASES: tuple[Phase, ...] = get_args(Phase)
MOST_FITS = FITS + 2 * len(NEIGHBOURS) + NUDGES  # a search that converges makes fewer


class FitBar:
    """A progress bar of fits.

    Args:
        budget: The budget. The best fit so far is among those with at most its computed steps.
        searches: Whether masks are searched, or one mask is fitted.
        disable: Whether to show nothing.
    """

    def __init__(self, budget: Budget, *, searches: bool, disable: bool) -> None:
        self._most = math.inf if budget.computed_steps is None else budget.computed_steps
        self._best = -math.inf
        self._phases = [phase for phase in PHASES if searches or phase not in ("budgets nearby", "noise levels")]
        self._bar = tqdm(total=MOST_FITS if searches else 1, desc="fit", unit="fit", disable=disable)

    def __enter__(self) -> FitBar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None and not self._bar.disable:
            self._bar.total = self._bar.n  # the search is over, with fewer fits than it might have made
            self._bar.refresh()
        self._bar.close()

    def began(self, phase: Phase) -> None:
        """Show the phase that begins and the one that comes next."""
        at = self._phases.index(phase)
        following = f", next: {self._phases[at + 1]}" if at + 1 < len(self._phases) else ""
        self._bar.set_description(f"fit ({phase}{following})")

    def tried(self, found: Fit) -> None:
        """Count a fit, and show its fidelity and the best so far."""
        computed = int(found.compute.sum())
        if computed <= self._most:
            self._best = max(self._best, found.score)
        best = f"best {decibels(self._best)}, " if self._best > -math.inf else ""
        self._bar.set_postfix_str(f"{best}{computed} steps {decibels(found.score)}", refresh=False)
        if self._bar.total is not None and self._bar.n >= self._bar.total:
            self._bar.total += 1
        self._bar.update()
