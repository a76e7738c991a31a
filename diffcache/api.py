"""Accelerate a pipeline, restore it, report on its runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from diffcache import host, tokens
from diffcache.documents.collection import read_schedules, schedules_in
from diffcache.documents.schedule import CacheSchedule
from diffcache.documents.schedule_set import ScheduleSet, demand_one
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import AlreadyAccelerated, BadOption, UnknownName, Unusable
from diffcache.executor import Executor, Misfit, criteria
from diffcache.executor.bound import Acceleration, Bound
from diffcache.executor.by_steps import BySteps, Source, title
from diffcache.executor.report import Report, report_of
from diffcache.kernels.library import Backend
from diffcache.schedulers import Rule, is_rule, parse_rule, rules

if TYPE_CHECKING:
    from diffcache.tokens.report import TokenReport

P = TypeVar("P")
One = CacheSchedule | Rule | str | Path
Schedule = One | ScheduleSet | tokens.TokenRule | TokenSchedule | Mapping[int, One]
FILES = (".safetensors", ".json")  # a text that ends so is a path, not a rule


def accelerate(
    pipe: P,
    schedule: Schedule = "auto",
    *,
    strict: bool = True,
    store: str | None = None,
    backend: Backend = "auto",
    mismatch: Misfit = "refuse",
    replace: bool = False,
) -> P:
    """Let ``pipe`` predict the denoiser outputs that ``schedule`` skips.

    The pipeline is changed in place, and remains unchanged if an error is raised. Only this object is layered.
    :func:`restore` removes all layers, in any order with the wrappers of other code. If the schedule computes every
    step, the output is bit-identical to that of the pipeline without diffcache. Everything that a run does otherwise
    than its schedule says is counted in :func:`report`, logged by the logger ``diffcache``, and issued as a
    ``FailedOpen`` warning (docs/serving.md).

    Args:
        pipe: A diffusers pipeline, a diffusion policy of a known family (docs/policies.md), or the network of your own
            sampling loop. Put :func:`trajectory` around such a loop. A language model that decodes masks needs none.
        schedule: A :class:`CacheSchedule`, its path, its id on the Hugging Face Hub, or a rule that needs no
            calibration: ``"auto:speedup=3"``, ``"uniform:every=3"``, ``"taylorseer:every=4,order=1"``, ``"full"``.
            ``sites=block`` in a rule applies it to each block. The default, ``"auto"``, computes a third of the steps.
            A dictionary, number of steps -> one of these, chooses by the number of steps of each run (iterations of its
            loop). So do a :class:`ScheduleSet`, its path, and a folder that holds schedules of several numbers of
            steps; on the Hub, their names begin with ``schedule``.
            For a language model, it is a token rule such as ``"dkv:refresh=8"``, or a :class:`TokenSchedule` or its
            path (docs/language-models.md). Nothing else is taken.
        strict: Whether to compare the configurations of the denoiser and the noise scheduler, the timesteps and the
            guidance scale with those of the schedule as well. False is meant for fine-tuned models.
        store: The format in which all outputs are kept: ``"bf16"``, ``"int8"``, ``"fp8"``, ``"int4"``, or ``"exact"``
            for the precision of the model. None keeps the formats of the schedule.
        backend: What runs operations on kept tensors: ``"torch"``, ``"compiled"`` (plain torch through
            ``torch.compile``), ``"triton"``, or ``"auto"`` for Triton on a GPU and plain torch elsewhere.
        mismatch: What happens to a run that does not fit the schedule, because its number of steps, its noise scheduler
            or its guidance differs. ``"refuse"`` raises ScheduleMismatch, in the second step at the latest. ``"full"``
            computes the run in full, bit-identical to a run without diffcache, and logs the reason.
        replace: Whether to take the place of a schedule that is on. If the new one is refused, the old one stays on.

    Returns:
        ``pipe``.

    Raises:
        UnsupportedModel: ``pipe`` cannot be accelerated.
        AlreadyAccelerated: ``pipe`` is accelerated and ``replace`` is False, or another cache is on.
        ScheduleMismatch: The schedule was made for another network or noise scheduler.
        DocumentError: The schedule is damaged or contradicts itself.
        UnknownName: There is no rule, option, denoiser or site of a name that was given.
        BadOption: An argument has a value that it cannot have.

    Example:
        >>> pipe = diffcache.accelerate(pipe)
        >>> image = pipe("a lighthouse in a storm").images[0]
        >>> print(diffcache.report(pipe))

        Serve two numbers of steps, and change to another schedule later:

        >>> pipe = diffcache.accelerate(pipe, {28: "flux-28.safetensors", 50: "flux-50.safetensors"}, replace=True)
        >>> pipe = diffcache.accelerate(pipe, "uniform:every=2", replace=True)
    """
    bound = Bound.of(pipe, bare=True)
    old = bound.acceleration
    if old is not None and not replace:
        raise AlreadyAccelerated(
            f"this {host.host_name(bound.pipe)} is accelerated already, by {_title(old)}. "
            "Call diffcache.restore first, then accelerate it again; or pass replace=True."
        )
    host.demand_no_other_cache(bound.pipe)
    executor: Acceleration
    schedule = loaded(schedule, for_tokens=host.language_model_of(pipe) is not None)
    if is_for_tokens(pipe, schedule):
        executor = tokens.cache_for(pipe, schedule, strict=strict, store=store, backend=backend)
    else:
        source = resolve_all(schedule)
        executor = Executor(
            bound.pipe, source, bound.sites, strict=strict, store=store, backend=backend, mismatch=mismatch
        )
    _put_on(bound, executor, old)
    return pipe


def loaded(schedule: Any, *, for_tokens: bool) -> Any:
    """Return what a path names. Of anything else, return ``schedule``.

    Args:
        schedule: See :func:`accelerate`.
        for_tokens: Whether it is for a language model. If so, a folder or an id on the Hub names a token schedule.

    Raises:
        DocumentError: A file is damaged or contradicts itself.
    """
    if isinstance(schedule, (str, Path)) and _is_file(schedule):
        return read_schedules(schedule)
    if for_tokens and isinstance(schedule, (str, Path)) and _is_collection(schedule):
        return TokenSchedule.from_pretrained(schedule)
    return schedule


def is_for_tokens(pipe: Any, schedule: Schedule) -> bool:
    """Return whether ``schedule`` is read as one for a language model: if ``pipe`` is one, or if it can be no other.

    Args:
        pipe: See :func:`accelerate`.
        schedule: What :func:`loaded` returns.
    """
    if host.language_model_of(pipe) is not None:
        return True
    if not isinstance(schedule, str):
        return isinstance(schedule, (tokens.TokenRule, TokenSchedule))
    name = schedule.partition(":")[0].lower().replace("-", "_")
    return tokens.is_token_rule(schedule) and name not in rules()


def _title(acceleration: Acceleration) -> str:
    """Return how errors refer to a schedule or a rule that is on."""
    if isinstance(acceleration, Executor):
        return title(acceleration.source)
    return f"the token rule {str(tokens.report_of(acceleration).rule)!r}"


def _put_on(bound: Bound, executor: Acceleration, old: Acceleration | None) -> None:
    """Accelerate a pipeline with ``executor`` instead of ``old``. If that fails, ``old`` is on again."""
    bound.detach()
    try:
        bound.attach(executor)
    except BaseException:
        if old is not None:
            bound.attach(old)
        raise


def restore(pipe: P) -> P:
    """Undo :func:`accelerate`.

    Args:
        pipe: What was given to :func:`accelerate`. A pipeline that is not accelerated remains unchanged.

    Returns:
        ``pipe``.

    Raises:
        UnsupportedModel: ``pipe`` cannot be accelerated.

    Example:
        >>> pipe = diffcache.restore(pipe)
    """
    bound = Bound.of(pipe, bare=True)
    if not bound.detach() and not hasattr(bound.pipe, "components"):
        host.denoisers(bound.pipe)  # raises UnsupportedModel
    return pipe


@contextmanager
def accelerated(
    pipe: P,
    schedule: Schedule = "auto",
    *,
    strict: bool = True,
    store: str | None = None,
    backend: Backend = "auto",
    mismatch: Misfit = "refuse",
    replace: bool = False,
) -> Iterator[P]:
    """Accelerate ``pipe`` in a ``with`` block, and restore it when the block ends.

    With ``replace=True``, a schedule that was on before the block is on again after it, with the counts of its report.

    Args:
        pipe: See :func:`accelerate`.
        schedule: See :func:`accelerate`.
        strict: See :func:`accelerate`.
        store: See :func:`accelerate`.
        backend: See :func:`accelerate`.
        mismatch: See :func:`accelerate`.
        replace: See :func:`accelerate`.

    Yields:
        ``pipe``.

    Raises:
        DiffCacheError: All that :func:`accelerate` raises.

    Example:
        >>> with diffcache.accelerated(pipe, "uniform:every=2"):
        ...     image = pipe("a lighthouse in a storm").images[0]
    """
    bound = Bound.of(pipe, bare=True)
    former = bound.acceleration if replace else None
    accelerate(pipe, schedule, strict=strict, store=store, backend=backend, mismatch=mismatch, replace=replace)
    try:
        yield pipe
    finally:
        restore(pipe)
        if former is not None:
            bound.attach(former)


def report(pipe: Any) -> Report | TokenReport:
    """Return what the last run of an accelerated pipeline did, or the run in progress.

    Args:
        pipe: What was given to :func:`accelerate`.

    Returns:
        The report. Printed, it is a small table. Of a language model with a token rule, it is a ``TokenReport``.

    Raises:
        BadOption: ``pipe`` is not accelerated.

    Example:
        >>> diffcache.report(pipe).skipped
        0.64
    """
    executor = Bound.of(pipe, bare=True).acceleration
    if executor is None:
        raise Unusable(
            f"this {host.host_name(pipe)}", "it is not accelerated", "Pass what was given to diffcache.accelerate"
        )
    return report_of(executor) if isinstance(executor, Executor) else tokens.report_of(executor)


def resolve_all(schedule: Schedule) -> Source:
    """Return what ``schedule`` names: a schedule, a rule, or several of them by number of steps.

    Args:
        schedule: See :func:`accelerate`.

    Raises:
        BadOption: ``schedule`` is of another type, or its keys are not the numbers of steps of its schedules.
        UnknownName: There is no such rule, or it has no such option.
        DocumentError: A file is damaged or contradicts itself.
    """
    if isinstance(schedule, Mapping):
        return BySteps({steps: resolve(one) for steps, one in schedule.items()})
    if _is_file(schedule):
        schedule = read_schedules(schedule)
    if isinstance(schedule, ScheduleSet):
        return BySteps(schedule.schedules)
    if isinstance(schedule, TokenSchedule):
        raise Unusable("schedule", "it is a TokenSchedule, for a language model", "Pass a CacheSchedule")
    if isinstance(schedule, (str, Path)) and _is_collection(schedule):
        found = schedules_in(schedule)
        return BySteps(found) if len(found) > 1 else next(iter(found.values()))
    return resolve(schedule)


def _is_collection(schedule: str | Path) -> bool:
    """Return whether a text or path that does not name a file names a folder, or a repository on the Hub."""
    if os.path.isdir(schedule):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        return isinstance(schedule, Path) or not is_rule(schedule)
    return isinstance(schedule, str) and "/" in schedule and not is_rule(schedule)


def _is_file(schedule: object) -> TypeGuard[str | Path]:
    """Return whether ``schedule`` names a file, which may be missing."""
    if isinstance(schedule, Path):
        return not os.path.isdir(schedule)  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
    return isinstance(schedule, str) and (schedule.endswith(FILES) or os.path.isfile(schedule))  # noqa: PTH113


def resolve(schedule: One | tokens.TokenRule) -> CacheSchedule | Rule:
    """Return the schedule, or the rule that makes one, that ``schedule`` names.

    Args:
        schedule: A schedule, its path, its id on the Hub, or a rule. Of a folder, ``schedule.safetensors`` is used.

    Raises:
        BadOption: ``schedule`` is of another type.
        UnknownName: There is no such rule, or it has no such option.
        DocumentError: The file is damaged or contradicts itself.
    """
    if isinstance(schedule, (CacheSchedule, Rule)):
        return schedule
    if isinstance(schedule, ScheduleSet):
        return demand_one("schedule", schedule)  # raises an error that says how to take one out
    if not isinstance(schedule, (str, Path)):
        raise BadOption("schedule", schedule, f"a CacheSchedule, a path, a hub id, or a rule ({', '.join(rules())})")
    if isinstance(schedule, Path) or _is_file(schedule):
        return CacheSchedule.load(schedule)
    if is_rule(schedule):
        return parse_rule(schedule)
    if "/" in schedule or os.path.isdir(schedule):  # noqa: PTH112
        return CacheSchedule.from_pretrained(schedule)
    criterion = schedule.partition(":")[0].lower().replace("-", "_")
    if criterion in criteria.available():
        raise UnknownName(
            "rule",
            criterion,
            rules(),
            next_step=f"{criterion!r} is a criterion, which decides in the run. Put it in a schedule, as the online "
            f'part of a denoiser\'s plan: DenoiserPlan(sites=…, online=Online(rule="{criterion}", '
            "limit=np.full(steps, 0.1))).",
        )
    return parse_rule(schedule)  # raises an error that lists the rules
