"""The noise scheduler that a pipeline has, and a better one for few steps."""

from __future__ import annotations

from typing import Any

from diffcache.documents.schedule import NO_NOISE_SCHEDULER


def noise_scheduler_name(pipe: Any) -> str:
    """The noise scheduler's everyday name: ``FlowMatchEulerDiscreteScheduler`` is Euler."""
    name = type(pipe.scheduler).__name__
    if name == NO_NOISE_SCHEDULER:
        return "its own solver"
    for part in ("Scheduler", "Discrete", "FlowMatch"):
        name = name.replace(part, "")
    return name


def noise_free_scheduler(pipe: Any) -> tuple[str, Any] | None:
    """(name, noise scheduler): DDIM, for a pipeline or a policy that draws noise at every step as DDPM does. Its steps
    begin at pure noise, where DDPM's own spacing of few steps would begin below it."""
    import diffusers

    if type(pipe.scheduler).__name__ != "DDPMScheduler":
        return None
    return "DDIM", diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")


def better_noise_scheduler(pipe: Any) -> tuple[str, Any] | None:
    """(name, noise scheduler): a multistep solver for the same model, the strongest common choice at few steps. None
    where the pipeline has it already, or where none takes its configuration."""
    import diffusers

    kind = type(pipe.scheduler).__name__
    if kind.startswith(("UniPC", "DPMSolver", NO_NOISE_SCHEDULER)):
        return None
    try:
        if kind.startswith("FlowMatch"):
            if pipe.scheduler.config.get("shift_terminal"):  # which UniPC lacks: it would stop at another noise level
                return None
            return "UniPC", diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=pipe.scheduler.config.shift,
                use_dynamic_shifting=pipe.scheduler.config.get("use_dynamic_shifting", False),
            )
        # The cosine noise schedule ends at a signal of nearly nothing; the clip is the solver's documented remedy.
        spacing = {"timestep_spacing": "trailing"} if kind == "DDPMScheduler" else {}
        return "DPM-Solver++", diffusers.DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", lambda_min_clipped=-5.1, **spacing
        )
    except (TypeError, ValueError, AttributeError, KeyError):  # a configuration that this solver does not know
        return None
