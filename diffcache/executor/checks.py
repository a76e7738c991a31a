"""Does this schedule belong to this pipeline, and to the run that is about to begin? Errors name both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffcache import host
from diffcache.errors import ScheduleMismatch, UnknownName
from diffcache.schedule import CacheSchedule

Sites = Mapping[str, Mapping[str, tuple[nn.Module, ...]]]  # denoiser -> site -> modules


def check_pipeline(pipe: Any, schedule: CacheSchedule, sites: Sites, *, strict: bool) -> None:
    """Refuse a schedule made for other networks or another noise scheduler."""
    for name, plan in schedule.denoisers.items():
        if name not in sites:
            raise UnknownName("denoiser", name, tuple(sites), next_step="The schedule was made for another pipeline.")
        module = sites[name]["model"][0]
        found = host.class_name(module)
        if plan.class_name not in (None, found):
            raise ScheduleMismatch(
                f"the schedule was made for {plan.class_name}; {name!r} of this {type(pipe).__name__} is {found}. "
                "Load the schedule of this model, or make one."
            )
        if strict and plan.config_digest not in (None, host.config_digest(module)):
            raise ScheduleMismatch(
                f"the schedule was made for a {found} of another configuration (digest {plan.config_digest}, here "
                f"{host.config_digest(module)}). Make a schedule for this model; strict=False accepts it as it is."
            )
        for site in plan.sites:
            if site not in sites[name]:
                raise UnknownName(f"site in {found}", site, tuple(sites[name]))
    check_noise_scheduler(pipe.scheduler, schedule, strict=strict)


def check_noise_scheduler(scheduler: Any, schedule: CacheSchedule, *, strict: bool) -> None:
    wanted = schedule.noise_scheduler
    if wanted is None:
        return
    found = type(scheduler).__name__
    if found != wanted.class_name:
        raise ScheduleMismatch(
            f"the schedule was fitted with the noise scheduler {wanted.class_name}; the pipeline has {found}. "
            f"Set pipe.scheduler = {wanted.class_name}.from_config(pipe.scheduler.config), or fit a schedule for "
            f"{found}."
        )
    if strict and host.config_digest(scheduler) != wanted.config_digest:
        raise ScheduleMismatch(
            f"the schedule was fitted with a {found} of another configuration (prediction type "
            f"{wanted.prediction_type}, digest {wanted.config_digest[:12]}…; here {host.prediction_type(scheduler)}, "
            f"{host.config_digest(scheduler)[:12]}…). Restore the scheduler's configuration, or fit a schedule for "
            "this one; strict=False accepts it as it is."
        )


def check_run(run: host.Run, schedule: CacheSchedule, *, strict: bool) -> None:
    """Refuse a run the schedule was not made for, before its first step."""
    if run.steps != schedule.steps:
        asked = getattr(run.scheduler, "num_inference_steps", None)
        # Second-order noise schedulers and PNDM take more iterations than they are asked for steps.
        again = f"num_inference_steps={schedule.steps}" if asked == run.steps else "the number it was made with"
        raise ScheduleMismatch(
            f"the schedule was made for {schedule.steps} steps; this run takes {run.steps} (noise scheduler "
            f"{type(run.scheduler).__name__}, num_inference_steps={asked}). Pass {again}, or make a schedule for "
            f"{run.steps}."
        )
    check_noise_scheduler(run.scheduler, schedule, strict=strict)
