"""Find noise schedulers that make a pipeline better at few steps."""

from __future__ import annotations

from typing import Any

from diffcache.documents.schedule import NO_NOISE_SCHEDULER


def noise_scheduler_name(scheduler: Any) -> str:
    """Return the usual name of a noise scheduler: ``FlowMatchEulerDiscreteScheduler`` is Euler."""
    name = type(scheduler).__name__
    if name == NO_NOISE_SCHEDULER:
        return "its own solver"
    for part in ("Scheduler", "Discrete", "FlowMatch"):
        name = name.replace(part, "")
    return name


def noise_free_scheduler(scheduler: Any) -> tuple[str, Any] | None:
    """Return DDIM in place of DDPM, which draws noise at every step.

    Its steps begin at pure noise. With DDPM's own spacing, few steps would begin at a lower noise level.

    Returns:
        The name and the noise scheduler; None if ``scheduler`` is not DDPM.
    """
    import diffusers

    if type(scheduler).__name__ != "DDPMScheduler":
        return None
    return "DDIM", diffusers.DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")


def better_noise_scheduler(scheduler: Any) -> tuple[str, Any] | None:
    """Return a multistep solver for the same model: UniPC for flow matching, DPM-Solver++ for other models.

    Returns:
        The name and the noise scheduler; None if ``scheduler`` is such a solver, or no solver supports its
        configuration.
    """
    import diffusers

    kind = type(scheduler).__name__
    if kind.startswith(("UniPC", "DPMSolver", NO_NOISE_SCHEDULER)):
        return None
    try:
        if kind.startswith("FlowMatch"):
            if scheduler.config.get("shift_terminal"):  # UniPC has no such option and would end at another level
                return None
            return "UniPC", diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=scheduler.config.shift,
                use_dynamic_shifting=scheduler.config.get("use_dynamic_shifting", False),
            )
        # The cosine noise schedule ends with almost no signal; the solver's documentation recommends this clip.
        spacing = {"timestep_spacing": "trailing"} if kind == "DDPMScheduler" else {}
        return "DPM-Solver++", diffusers.DPMSolverMultistepScheduler.from_config(
            scheduler.config, algorithm_type="dpmsolver++", lambda_min_clipped=-5.1, **spacing
        )
    except (TypeError, ValueError, AttributeError, KeyError):  # the solver does not support the configuration
        return None
