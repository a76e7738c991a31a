"""Does this schedule belong to this pipeline, and to the run that is about to begin? Errors name both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffcache import host
from diffcache.documents.checks import refuse
from diffcache.documents.schedule import NO_NOISE_SCHEDULER, CacheSchedule, Guidance, noise_scheduler_title
from diffcache.errors import BadOption, ScheduleMismatch, UnknownName, UnsupportedModel
from diffcache.executor import criteria
from diffcache.executor.criteria import Where
from diffcache.executor.prediction import repeats, repetition
from diffcache.executor.state import Call
from diffcache.host.structure import find_sites
from diffcache.schedulers import Rule

SAME_GRID = 1e-4  # of the largest timestep; integer grids of one kind agree exactly, others to rounding

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
                f"the schedule was made for a {found} of another configuration (digest {plan.config_digest:.12}…, here "
                f"{host.config_digest(module):.12}…): {_settings(module, schedule, name, plan.config_digest)}. Make a "
                "schedule for this model; strict=False accepts it as it is."
            )
        for site in plan.sites:
            if site not in sites[name]:
                hidden = _HIDDEN.format(name) if site in _hidden(module) else ""
                raise UnknownName(f"site in {found}", site, tuple(sites[name]), next_step=hidden)
    check_noise_scheduler(pipe.scheduler, schedule, strict=strict)


_HIDDEN = (
    "{0!r} was compiled as one graph by torch.compile, which hides the sites inside it. To cache inside, compile block "
    "by block ({0}.compile_repeated_blocks()), or cache the whole network (sites='model')."
)


def _hidden(module: nn.Module) -> Mapping[str, object]:
    """Return the sites of the network that ``torch.compile`` wrapped; none where it wrapped nothing."""
    network = host.unwrapped(module)
    return {} if network is module else find_sites(network)


def check_criteria(schedule: CacheSchedule) -> None:
    """Refuse a schedule whose criterion does not exist or does not accept its parameters or plans.

    Args:
        schedule: A schedule that is about to run. Its own checks cover the form of the name alone.

    Raises:
        UnknownName: No criterion has the name.
        DocumentError: A parameter is set that the criterion does not use, or a plan has several anchors where the run
            decides which steps compute.
    """
    for name, plan in schedule.denoisers.items():
        criterion = criteria.of(plan)
        if plan.online is None or criterion is None:
            continue
        for parameter in criteria.PARAMETERS:
            if getattr(plan.online, parameter) is not None and parameter not in criterion.about.parameters:
                allowed = f"null: the online rule {criterion.name!r} does not use it"
                refuse("schedule", f"{name}/online/{parameter}", "found a value", allowed)
        criterion.check(plan.online)
        for site, planned in plan.sites.items():
            if planned.anchors > 1 and not criterion.about.keeps_anchors:
                found = f"{planned.anchors} anchors under the online rule {criterion.name!r}"
                allowed = "1: which steps are computed is not known before the run"
                refuse("schedule", f"{name}/{site}/weights", found, allowed)


def check_granularity(rule: Rule, sites: Sites) -> None:
    """Refuse a rule for sites of a network that cannot be reached because the network is compiled."""
    for name, modules in sites.items():
        hidden = {site.partition(":")[0] for site in _hidden(modules["model"][0])} - {"model"}
        if rule.granularity in hidden:
            raise BadOption("sites", rule.granularity, f"'model': {_HIDDEN.format(name)}".rstrip("."))


def check_compiled(name: str, denoiser: nn.Module, patched: Sequence[str]) -> None:
    """Refuse sites inside a compiled graph: a decision taken there would break it, or be compiled in once for all."""
    inside: dict[str, str] = {}  # path -> a site in it
    for site in patched:
        granularity, _, path = site.partition(":")
        parts = path.split(".") if granularity == "stack" else path.split(".")[:-1]
        for around in ["", *(".".join(parts[:n]) for n in range(1, len(parts) + 1))] if path else []:
            inside.setdefault(around, site)
    for around, site in inside.items():
        if host.is_compiled(denoiser.get_submodule(around)):
            raise UnsupportedModel(
                f"{site!r} of {name!r} lies inside {around or name!r}, which is compiled as one graph. Cache "
                "the compiled module itself or what lies around it, or compile block by block "
                "(compile_repeated_blocks)."
            )


def check_in_parts(pipe: Any, schedule: CacheSchedule) -> None:
    """Refuse decisions that processes which run a denoiser together would each take from their own part of it."""
    for name in host.in_parts(pipe):
        criterion = criteria.of(schedule.denoisers.get(name))
        if criterion is not None and criterion.about.where is not Where.MODEL:
            others = ", ".join(criteria.deciding_at(Where.MODEL))
            raise UnsupportedModel(
                f"the rule {criterion.name!r} decides inside the first block of {name!r}, of which each process sees "
                "its part here (enable_parallelism): they would decide differently and wait for each other for ever. "
                f"Use a schedule without a rule, or one that sees the whole input ({others})."
            )


def check_noise_scheduler(scheduler: Any, schedule: CacheSchedule, *, strict: bool) -> None:
    wanted = schedule.noise_scheduler
    if wanted is None:
        return
    found = type(scheduler).__name__
    if found != wanted.class_name and NO_NOISE_SCHEDULER in (found, wanted.class_name):
        made, here = (noise_scheduler_title(name) for name in (wanted.class_name, found))
        raise ScheduleMismatch(
            f"noise scheduler of the schedule: {made}; of this loop: {here}. Run the loop that the schedule was fitted "
            "to, or fit a schedule for this one."
        )
    if found != wanted.class_name:
        raise ScheduleMismatch(
            f"the schedule was fitted with the noise scheduler {wanted.class_name}; the pipeline has {found}. "
            f"Set pipe.scheduler = {wanted.class_name}.from_config(pipe.scheduler.config), or fit a schedule for "
            f"{found}."
        )
    if strict and host.config_digest(scheduler) != wanted.config_digest:
        digest, here = wanted.config_digest, host.config_digest(scheduler)
        raise ScheduleMismatch(
            f"the schedule was fitted with a {'solver' if found == NO_NOISE_SCHEDULER else found} of another "
            "configuration "
            f"(prediction type {wanted.prediction_type}, digest {digest:.12}…; here {host.prediction_type(scheduler)}, "
            f"{here:.12}…): {_settings(scheduler, schedule, 'scheduler', digest)}. Restore the scheduler's "
            "configuration, or fit a schedule for this one; strict=False accepts it as it is."
        )


def _settings(found: Any, schedule: CacheSchedule, name: str, digest: str | None) -> str:
    return host.other_settings(found, schedule.provenance.get(f"config/{name}"), digest or "")


def check_run(pipe: Any, run: host.Run, schedule: CacheSchedule, *, strict: bool) -> None:
    """Refuse a run the schedule was not made for, before its first step. The time grid and the guidance scale, which
    shift the optimum without breaking anything, are compared only if ``strict``."""
    if run.steps != schedule.steps:
        asked = getattr(run.scheduler, "num_inference_steps", None)
        # Second-order noise schedulers and PNDM take more iterations than they are asked for steps.
        again = f"num_inference_steps={schedule.steps}" if asked == run.steps else "the number it was made with"
        by = f" (noise scheduler {type(run.scheduler).__name__}, num_inference_steps={asked})" if asked else ""
        raise ScheduleMismatch(
            f"the schedule was made for {schedule.steps} steps; this run takes {run.steps}{by}. Pass {again}, or make "
            f"a schedule for {run.steps}; mismatch='full' computes such runs in full."
        )
    check_noise_scheduler(run.scheduler, schedule, strict=strict)
    if strict:
        _check_start(run, schedule)
        _check_grid(run, schedule)
        check_scales(host.guidance_values(pipe), schedule)


def _check_start(run: host.Run, schedule: CacheSchedule) -> None:
    if all(plan.called is None for plan in schedule.denoisers.values()):
        return
    wanted = int(schedule.called.argmax())
    if run.start != wanted:
        raise ScheduleMismatch(
            f"the schedule was fitted for loops that begin at step {wanted} of {schedule.steps}; this one begins at "
            f"step {run.start}. Pass the strength that it was fitted with, or fit a schedule for this one; "
            "strict=False accepts it as it is."
        )


def check_call(pipe: Any, call: Mapping[str, Any], schedule: CacheSchedule) -> None:
    """Refuse a call that asks for other steps or another guidance scale than the schedule's, before the call runs."""
    steps = host.iterations(pipe, call)
    if steps is not None:
        check_steps(schedule, steps)
    check_scales(call, schedule)


def check_steps(schedule: CacheSchedule, steps: int) -> None:
    """Refuse a loop that is known to take another number of steps than the schedule's."""
    if steps != schedule.steps:
        raise ScheduleMismatch(
            f"the schedule was made for {schedule.steps} steps; this call takes {steps}. Pass the number it was made "
            f"with, or make a schedule for {steps}."
        )


def _check_grid(run: host.Run, schedule: CacheSchedule) -> None:
    if schedule.timesteps is None:
        return
    here = run.timesteps.detach().cpu().double().numpy()
    apart = np.abs(here - schedule.timesteps)
    if apart.max() > SAME_GRID * np.abs(schedule.timesteps).max():
        worst = int(apart.argmax())
        raise ScheduleMismatch(
            f"the schedule was fitted on other timesteps: {schedule.timesteps[worst]:.6g} at step {worst}, here "
            f"{here[worst]:.6g}. Custom sigmas, or a resolution that shifts them, make another grid. Run on the grid "
            "it was fitted on, or fit a schedule for this one; strict=False accepts it as it is."
        )


def check_scales(here: Mapping[str, Any], schedule: CacheSchedule) -> None:
    """Refuse other guidance scales, by the name of the pipeline's argument, than the schedule's."""
    if schedule.guidance is None:
        return
    for name, wanted in schedule.guidance.scales.items():
        value = here.get(name, wanted)
        if value is not None and not isinstance(value, (int, float)):
            continue
        if value is None or abs(wanted - value) > 1e-6 * max(abs(wanted), 1):
            found = "None" if value is None else f"{value:g}"
            raise ScheduleMismatch(
                f"the schedule was fitted with {name}={wanted:g}; this run uses {found}. Pass {name}={wanted:g}, or "
                f"fit a schedule for {found}; strict=False accepts it as it is."
            )


def check_guidance(
    pipe: Any, run: host.Run, call: Call, x: Sequence[Tensor], refuse: Callable[[ScheduleMismatch], None]
) -> None:
    """In a run's first two steps: are there as many branches as the coefficients were fitted for?

    Args:
        pipe: the pipeline.
        run: its loop.
        call: the forward that is beginning.
        x: tensors of the denoiser's main input.
        refuse: called at the end of the first step, if only the noise scheduler's sample shows that there are not.

    Raises:
        ScheduleMismatch: there are not.
    """
    guidance = call.state.schedule.guidance
    if guidance is None:
        return
    call.state.batch_at_start.setdefault(call.denoiser, call.batch)
    if call.step == run.start:
        made = call.state.calls_at_start.get(call.denoiser, 0)
        call.state.calls_at_start[call.denoiser] = made + 1
        asked = guidance.mode == "batched" or (guidance.mode == "none" and host.batches_guidance(pipe))
        if asked and not made:
            _check_batch(run, guidance, x, refuse)
    elif call.step == run.start + 1:
        expected = guidance.branches if guidance.mode == "separate" else 1
        seen = call.state.calls_at_start.pop(call.denoiser, expected)  # at the first forward of the step
        if seen != expected:
            raise ScheduleMismatch(
                f"the schedule was fitted for {expected} calls of {call.denoiser!r} at each step "
                f"(guidance {guidance.mode!r}); this run makes {seen}. Set guidance as it was, or fit a schedule "
                "for this setting."
            )


def _check_batch(
    run: host.Run, guidance: Guidance, x: Sequence[Tensor], refuse: Callable[[ScheduleMismatch], None]
) -> None:
    """Refuse a batch that does not hold the branches that the schedule was fitted with, or holds them for a schedule
    without guidance. Where the batch does not show it, the noise scheduler's sample does, at the end of the step."""
    times = max(guidance.branches, 2)
    found = repetition(x, times)
    if found is None and run.forwards:  # no noise scheduler, so nothing to compare with
        found = repeats(x, times)
    if found is not None:
        _demand(guidance, found)
        return
    rows = len(x[0])

    def compare(sample: Tensor) -> None:
        try:
            _demand(guidance, rows == times * len(sample))
        except ScheduleMismatch as why:
            refuse(why)

    run.waiting.append(compare)


def _demand(guidance: Guidance, guided: bool) -> None:
    if guidance.mode == "batched" and not guided:
        raise ScheduleMismatch(
            f"the schedule was fitted with guidance: {guidance.branches} branches in one batch. This run's "
            "batch does not repeat its samples so; guidance is off or has another form. Turn guidance on as it "
            "was, or fit a schedule for this setting."
        )
    if guidance.mode == "none" and guided:
        raise ScheduleMismatch(
            "the schedule was fitted without guidance; this run is guided, with both branches in one batch. "
            "Turn guidance off as it was, or fit a schedule for this setting."
        )
