"""Check whether schedules fit a model, as far as this is known before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffcache import host
from diffcache.cli._calls import STEPS, Asked
from diffcache.cli._models import Named
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import ScheduleMismatch, UnknownName
from diffcache.eval.methods import Method
from diffcache.executor.by_steps import BySteps, Source, members
from diffcache.executor.checks import check_scales, check_steps

TWICE = ("Heun", "KDPM2", "PNDM")  # noise schedulers that take more iterations than the requested steps


def check(model: Named, asked: Asked, methods: Sequence[Method]) -> None:
    """Check the schedules of ``methods`` against the calls and the classes of a model.

    Raises:
        ScheduleMismatch: If a schedule has other steps, guidance scales or classes of networks.
        UnknownName: If a schedule is for a denoiser that the model does not have.
    """
    for method in methods:
        if method.source is None:
            continue
        for row in asked.rows or [{}]:
            call = asked.shared | row
            known = STEPS in call and not any(name in call for name in host.GRIDS)
            _check_call(model, call, method.source, call[STEPS] if known else None)
        for schedule in members(method.source).values():
            if isinstance(schedule, CacheSchedule):
                _check_classes(model, schedule)


def _check_call(model: Named, call: Mapping[str, Any], source: Source, steps: int | None) -> None:
    """Check the schedule for a call.

    Args:
        model: The model.
        call: The arguments of the call.
        source: The schedule, or several by number of steps.
        steps: Number of steps that the call asks for. None: not known.
    """
    taken = None if steps is None else _iterations(model, steps, source)
    if isinstance(source, BySteps):
        if taken is None:
            return
        source = source.of(taken)
    if isinstance(source, CacheSchedule):
        if taken is not None:
            check_steps(source, taken)
        check_scales(call, source)


def _iterations(model: Named, steps: int, source: Source) -> int | None:
    """Return the iterations of the loop for ``steps`` steps; None if they are not known."""
    planned = model.planned(steps) if model.kind == "pretrained" else None
    if planned is not None:
        return planned
    schedulers = [one.noise_scheduler for one in members(source).values() if isinstance(one, CacheSchedule)]
    names = [None if scheduler is None else scheduler.class_name for scheduler in schedulers]
    known = bool(names) and not any(name is None or any(word in name for word in TWICE) for name in names)
    return steps if known else None


def _check_classes(model: Named, schedule: CacheSchedule) -> None:
    made_for = {name: plan.class_name for name, plan in schedule.denoisers.items()}
    for name in made_for:
        if model.classes and name not in model.classes:
            known = tuple(part for part in model.classes if part)
            raise UnknownName("denoiser", name, known, next_step="The schedule was made for another pipeline.")
    if schedule.noise_scheduler is not None:
        made_for["scheduler"] = schedule.noise_scheduler.class_name
    for name, wanted in made_for.items():
        found = model.classes.get(name)
        if found is not None and wanted not in (None, found):
            raise ScheduleMismatch(
                f"the schedule was made for {wanted}; {name!r} of {model.name!r} is {found}. Load the schedule of this "
                "model, or make one."
            )
