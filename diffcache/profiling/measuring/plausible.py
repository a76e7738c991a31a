"""Check a partial profile of one call that comes from a file, which may hold anything."""

from __future__ import annotations

import numpy as np

from diffcache.documents import checks
from diffcache.documents.checks import refuse
from diffcache.documents.profile import Dynamics
from diffcache.errors import DocumentError
from diffcache.profiling.measuring.partial_profile import Arrays, PartialProfile
from diffcache.profiling.measuring.tables import Sums, site_tables
from diffcache.profiling.replay.run_facts import RunFacts

TABLES = tuple(f"{of}/{table}" for of in ("output", "residual") for table in ("l1", "relative_l1", "gram"))
CHANGES = ("input_change", "modulated_change", "residual_ratio")


def demand_sound(where: str, found: PartialProfile, index: int) -> None:
    """Check that ``found`` can be the measurement of call ``index`` alone.

    Raises:
        DocumentError: It cannot. The error names ``where``.
    """
    try:
        if list(found.calls) != [index] or (found.first is not None) != (index == 0):
            refuse(where, "calls", f"found {list(found.calls)!r:.80}", f"call {index} alone")
        here = found.calls[index].facts
        steps = _run_facts(where, here)
        checks.notes(where, "left_out", found.calls[index].left_out)
        _dynamics(where, found.calls[index].arrays, here, steps)
        if "model" not in found.sites:
            refuse(where, "sites", "found no tables of the model", "tables of the model at least")
        for site, branches in found.sites.items():
            checks.site(where, "sites", site)
            if len(branches) not in (1, here.branches):
                refuse(where, f"sites/{site}", f"found {len(branches)} branches", f"1 or {here.branches}")
            for branch in branches:
                _sums(where, site, branch, steps)
            site_tables(branches)
        if found.first is not None:
            found.profile()
    except DocumentError as error:
        if error.where == where:
            raise
        refuse(where, error.field, error.problem, "what a measurement writes")
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Values of wrong types meet code that was written for its own.
        refuse(where, "findings", f"{type(error).__name__}: {error!s:.100}", "what a measurement writes")


def _run_facts(where: str, here: RunFacts) -> int:
    """Check the facts about a run and return its number of steps."""
    total, start, end = here.grid
    total = checks.count(where, "grid", total, least=1)
    start = checks.count(where, "grid", start, least=0)
    end = checks.count(where, "grid", end, least=0)
    if not start < end <= total:
        found = f"found a loop over {total} steps that begins at {start} and ends before {end}"
        refuse(where, "grid", found, "a beginning before the end, on the grid")
    for name, least in (("samples", 0), ("branches", 1), ("in_batch", 1), ("copies", 1)):
        checks.count(where, name, getattr(here, name), least=least)
    for begin in here.begins:
        if checks.count(where, "begins", begin, least=0) >= end - start:
            refuse(where, "begins", f"found {begin}", f"a step below {end - start}")
    for name, kind in (("obstacle", str), ("repeats", bool), ("bent", bool)):
        checks.instance(where, name, getattr(here, name), kind)
    for name, scale in here.guidance_scales.items():
        checks.text(where, "guidance_scales", name)
        checks.real(where, f"guidance_scales/{name}", scale)
    return end - start


def _dynamics(where: str, arrays: Arrays, here: RunFacts, steps: int) -> None:
    known = {"grams", "peaks"}
    allowed: list[set[str]] = [set()] if here.obstacle else [known, known | {"answers"}]
    if set(arrays) not in allowed:
        refuse(where, "calls", f"found the arrays {sorted(arrays)!r:.80}", " or ".join(map(repr, map(sorted, allowed))))
    if not arrays:
        return
    if "answers" in arrays:
        checks.array(where, "answers", arrays["answers"], np.float64, sum=3, sample=here.samples, step=steps)
    silent = np.zeros(steps)
    Dynamics(
        grams=arrays["grams"], peaks=arrays["peaks"], reach=np.zeros((steps, steps)), response=silent, spread=silent
    )
    if len(arrays["grams"]) != here.samples:
        refuse(where, "grams", f"found {len(arrays['grams'])} samples", f"{here.samples}")


def _sums(where: str, site: str, sums: Sums, steps: int) -> None:
    checks.count(where, f"sites/{site}", sums.samples, least=1)
    for name, array in sums.arrays.items():
        field = f"sites/{site}/{name}"
        if name in TABLES:
            checks.array(where, field, array, np.float64, step=steps, other=steps)
        elif name in CHANGES:
            checks.array(where, field, array, np.float64, step=steps)
            if array.min() < 0:
                refuse(where, field, f"found {array.min():g}", "0 or more")
        else:
            refuse(where, field, "an unknown table", ", ".join((*TABLES, *CHANGES)))
