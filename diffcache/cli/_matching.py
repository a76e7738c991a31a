"""Check whether schedules fit a model, as far as this is known before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache import host
from diffcache.cli._calls import STEPS, Asked
from diffcache.cli._models import Named
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import ScheduleMismatch, UnknownName
from diffcache.eval.methods import Method
from diffcache.executor.checks import check_scales, check_steps

TWICE = ("Heun", "KDPM2", "PNDM")  # noise schedulers that take more iterations than the requested steps


def check(model: Named, asked: Asked, methods: Sequence[Method]) -> None:
    """Check the schedules of ``methods`` against the calls and the classes of a model.

    Raises:
        ScheduleMismatch: If a schedule has other steps, guidance scales or classes of networks.
        UnknownName: If a schedule is for a denoiser that the model does not have.
    """
    for method in methods:
        if not isinstance(method.source, CacheSchedule):
            continue
        for row in asked.rows or [{}]:
            call = asked.shared | row
            if STEPS in call and not any(name in call for name in host.GRIDS):
                _check_steps(model, call[STEPS], method.source)
            check_scales(call, method.source)
        _check_classes(model, method.source)


def _check_steps(model: Named, steps: int, schedule: CacheSchedule) -> None:
    planned = model.planned(steps) if model.kind == "pretrained" else None
    scheduler = schedule.noise_scheduler
    if planned is None and scheduler is not None and not any(word in scheduler.class_name for word in TWICE):
        planned = steps
    if planned is not None:
        check_steps(schedule, planned)


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
