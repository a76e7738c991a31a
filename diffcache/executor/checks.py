"""Check that a schedule fits a pipeline and the run that is about to begin. Errors name both."""

from __future__ import annotations

import dataclasses
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

SAME_GRID = 1e-4  # relative to the largest timestep; equal integer grids agree exactly, others up to rounding

Sites = Mapping[str, Mapping[str, tuple[nn.Module, ...]]]  # denoiser -> site -> modules


def check_pipeline(pipe: Any, schedule: CacheSchedule, sites: Sites, *, strict: bool) -> None:
    """Check that a schedule was made for the networks and the noise scheduler of a pipeline.

    Args:
        pipe: The pipeline.
        schedule: The schedule.
        sites: The modules of every site of the denoisers.
        strict: Whether to compare configurations as well.

    Raises:
        UnknownName: The pipeline has no denoiser, or no site, of a name in the schedule.
        ScheduleMismatch: A class or a configuration differs.
    """
    for name, plan in schedule.denoisers.items():
        if name not in sites:
            raise UnknownName("denoiser", name, tuple(sites), next_step="The schedule was made for another pipeline.")
        module = sites[name]["model"][0]
        found = host.class_name(module)
        if plan.class_name not in (None, found):
            raise ScheduleMismatch(
                f"the schedule was made for {plan.class_name}; {name!r} of this {host.host_name(pipe)} is {found}. "
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
    check_noise_scheduler(host.noise_scheduler(pipe), schedule, strict=strict)


_HIDDEN = (
    "{0!r} was compiled as one graph by torch.compile, which hides the sites inside it. To cache inside, compile block "
    "by block ({0}.compile_repeated_blocks()), or cache the whole network (sites='model')."
)


def _hidden(module: nn.Module) -> Mapping[str, object]:
    """Return the sites inside a network that ``torch.compile`` wrapped. It is empty for other networks."""
    network = host.unwrapped(module)
    return {} if network is module else find_sites(network)


def check_criteria(schedule: CacheSchedule) -> None:
    """Check that the criteria of a schedule exist and accept its parameters and plans.

    Args:
        schedule: A schedule that is about to run. The schedule itself has checked only the form of the names.

    Raises:
        UnknownName: No criterion has the name, or it has not one of the options.
        BadOption: The value of an option is not of its type.
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
        criterion.check(dataclasses.replace(plan.online, options=criterion.options))
        for site, planned in plan.sites.items():
            if planned.anchors > 1 and not criterion.about.keeps_anchors:
                found = f"{planned.anchors} anchors under the online rule {criterion.name!r}"
                allowed = "1, because the computed steps are not known before the run"
                refuse("schedule", f"{name}/{site}/weights", found, allowed)


def check_granularity(rule: Rule, sites: Sites) -> None:
    """Raise BadOption if a rule is for sites that cannot be layered because the network is compiled."""
    for name, modules in sites.items():
        hidden = {site.partition(":")[0] for site in _hidden(modules["model"][0])} - {"model"}
        if rule.granularity in hidden:
            raise BadOption("sites", rule.granularity, f"'model': {_HIDDEN.format(name)}".rstrip("."))


def check_compiled(name: str, denoiser: nn.Module, patched: Sequence[str]) -> None:
    """Raise UnsupportedModel if a site is inside a compiled graph.

    A layer there would break the graph, or its decision would become a constant of the graph.

    Args:
        name: The component name of the network.
        denoiser: The network.
        patched: The sites that get a layer.
    """
    inside: dict[str, str] = {}  # path -> a site in it
    for site in patched:
        granularity, _, path = site.partition(":")
        parts = path.split(".") if granularity == "stack" else path.split(".")[:-1]
        for outer in ["", *(".".join(parts[:n]) for n in range(1, len(parts) + 1))] if path else []:
            inside.setdefault(outer, site)
    for outer, site in inside.items():
        if host.is_compiled(denoiser.get_submodule(outer)):
            raise UnsupportedModel(
                f"{site!r} of {name!r} lies inside {outer or name!r}, which is compiled as one graph. Cache "
                "the compiled module itself or what lies around it, or compile block by block "
                "(compile_repeated_blocks)."
            )


def check_in_parts(pipe: Any, schedule: CacheSchedule) -> None:
    """Raise UnsupportedModel if several processes run a denoiser together and would decide from their parts of it."""
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
    """Check that a schedule was made for this noise scheduler.

    Args:
        scheduler: The noise scheduler.
        schedule: The schedule.
        strict: Whether to compare configurations as well.

    Raises:
        ScheduleMismatch: The class or the configuration differs.
    """
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
    """Return the settings of ``found`` that differ from those in the provenance of the schedule, for an error."""
    return host.other_settings(found, schedule.provenance.get(f"config/{name}"), digest or "")


def check_run(pipe: Any, run: host.LoopRun, schedule: CacheSchedule, *, strict: bool) -> None:
    """Check before the first step that a schedule was made for a run.

    Args:
        pipe: The pipeline.
        run: The run.
        schedule: The schedule.
        strict: Whether to compare timesteps, the first step and guidance scales as well. If they differ, the run works,
            but its result may be worse.

    Raises:
        ScheduleMismatch: The run does not fit the schedule.
    """
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


def _check_start(run: host.LoopRun, schedule: CacheSchedule) -> None:
    """Raise ScheduleMismatch if a run begins at another step than the runs that the schedule was fitted to."""
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
    """Raise ScheduleMismatch if a call asks for another number of steps or guidance scale than the schedule's."""
    steps = host.iterations(pipe, call)
    if steps is not None:
        check_steps(schedule, steps)
    check_scales(call, schedule)


def check_steps(schedule: CacheSchedule, steps: int) -> None:
    """Raise ScheduleMismatch if ``steps`` is not the number of steps of the schedule."""
    if steps != schedule.steps:
        raise ScheduleMismatch(
            f"the schedule was made for {schedule.steps} steps; this call takes {steps}. Pass the number it was made "
            f"with, or make a schedule for {steps}."
        )


def _check_grid(run: host.LoopRun, schedule: CacheSchedule) -> None:
    """Raise ScheduleMismatch if the timesteps of a run are not those of the schedule."""
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
    """Raise ScheduleMismatch if a guidance scale is not that of the schedule.

    Args:
        here: The scales, by name of the pipeline's argument.
        schedule: The schedule.
    """
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
    pipe: Any, run: host.LoopRun, call: Call, x: Sequence[Tensor], refuse: Callable[[ScheduleMismatch], None]
) -> None:
    """Check in the first two steps of a run that guidance has the branches that the schedule was fitted with.

    Args:
        pipe: The pipeline.
        run: The run.
        call: The forward that begins.
        x: The tensors of the denoiser's main input.
        refuse: Called with the error at the end of the first step, if only the sample of the noise scheduler shows
            that the branches differ.

    Raises:
        ScheduleMismatch: The branches differ.
    """
    guidance = call.state.schedule.guidance
    if guidance is None:
        return
    call.state.batch_at_start.setdefault(call.denoiser, call.batch)
    if call.step == run.start:
        made = call.state.calls_at_start.get(call.denoiser, 0)
        call.state.calls_at_start[call.denoiser] = made + 1
        asked = guidance.layout.batched or (guidance.mode == "none" and host.batches_guidance(pipe))
        if asked and not made:
            _check_batch(run, guidance, x, refuse)
    elif call.step == run.start + 1:
        expected = guidance.layout.forwards
        seen = call.state.calls_at_start.pop(call.denoiser, expected)  # at the first forward of the step
        if seen != expected:
            raise ScheduleMismatch(
                f"the schedule was fitted for {expected} calls of {call.denoiser!r} at each step "
                f"(guidance {guidance.mode!r}); this run makes {seen}. Set guidance as it was, or fit a schedule "
                "for this setting."
            )


def _check_batch(
    run: host.LoopRun, guidance: Guidance, x: Sequence[Tensor], refuse: Callable[[ScheduleMismatch], None]
) -> None:
    """Check that a batch holds the branches that the schedule was fitted with, or none for one without guidance.

    If the batch does not show it, the sample of the noise scheduler is compared at the end of the step.

    Args:
        run: The run.
        guidance: The guidance of the schedule.
        x: The tensors of the denoiser's main input.
        refuse: Called with the error at the end of the step.

    Raises:
        ScheduleMismatch: The branches differ.
    """
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
    """Raise ScheduleMismatch if a run is guided and the schedule is not, or the other way round."""
    if guidance.layout.batched and not guided:
        raise ScheduleMismatch(
            f"the schedule was fitted with guidance: {guidance.branches} branches in one batch. This run's "
            "batch does not repeat its samples in this way: guidance is off or has another form. Turn guidance "
            "on as it was, or fit a schedule for this setting."
        )
    if guidance.mode == "none" and guided:
        raise ScheduleMismatch(
            "the schedule was fitted without guidance; this run is guided, with both branches in one batch. "
            "Turn guidance off as it was, or fit a schedule for this setting."
        )
