"""What an accelerated run is compared with at the same number of computed steps."""

from __future__ import annotations

from typing import Any

from diffcache.schedule import CacheSchedule, DenoiserPlan
from diffcache.schedulers.uniform import evenly, reuse


def solver_of(pipe: Any) -> str:
    """The noise scheduler's everyday name: ``FlowMatchEulerDiscreteScheduler`` is Euler."""
    name = type(pipe.scheduler).__name__
    for part in ("Scheduler", "Discrete", "FlowMatch"):
        name = name.replace(part, "")
    return name


def better_solver(pipe: Any) -> tuple[str, Any]:
    """(name, noise scheduler): a multistep solver for the same model, the strongest common choice at few steps."""
    import diffusers

    if type(pipe.scheduler).__name__.startswith("FlowMatch"):
        solver = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=pipe.scheduler.config.shift
        )
        return "UniPC", solver
    # The cosine noise schedule ends at a signal of nearly nothing; the clip is the solver's documented remedy.
    return "DPM-Solver++", diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", lambda_min_clipped=-5.1
    )


def uniform_reuse(denoiser: str, steps: int, computed: int) -> CacheSchedule:
    """The newest output, reused between ``computed`` evenly spread steps."""
    return CacheSchedule(
        steps=steps, denoisers={denoiser: DenoiserPlan(sites={"model": reuse(evenly(steps, computed))})}
    )
