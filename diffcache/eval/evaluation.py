"""Compare schedules of a pipeline with the full run and with other methods of the same cost."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffcache import host
from diffcache.api import Schedule
from diffcache.documents import files
from diffcache.documents.destinations import check_folder
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule
from diffcache.documents.schedule_set import ScheduleSet
from diffcache.errors import BadOption, Unusable
from diffcache.eval import metrics as metric_room
from diffcache.eval import results
from diffcache.eval import trials as tried
from diffcache.eval.checks import check_counted, check_kinds, check_names, check_outputs, check_title
from diffcache.eval.extractors import Extractor
from diffcache.eval.methods import Method, full, ours
from diffcache.eval.metrics import Scorer
from diffcache.eval.plausible import Part
from diffcache.eval.record import JsonObject, assembled, circumstances, read
from diffcache.eval.report import write_html
from diffcache.eval.results import MethodResult
from diffcache.eval.runner import Compare, Judges, run_share
from diffcache.eval.saved_parts import EvaluationFolder, slug
from diffcache.eval.set_distances import sets_of
from diffcache.eval.statistics import enough
from diffcache.eval.subject import Subject
from diffcache.eval.table import markdown
from diffcache.eval.text import Score, TextEvaluation, evaluate_text, token_method
from diffcache.eval.trials import Trials
from diffcache.executor.by_steps import BySteps, members
from diffcache.profiling.measuring.token_measure import demand_loop
from diffcache.profiling.recording import all_shares, demand_own_generators
from diffcache.schedulers import Rule
from diffcache.settings import shows_progress
from diffcache.simulation.simulator import Simulator
from diffcache.text import card, printable

PROMISED_IN = "state"  # the metric in which schedules state their expected fidelity


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation.

    ``evaluation["name"]`` holds the results of one method.

    Attributes:
        record: All results, as docs/evaluation-record.md describes them.
        folder: The folder that holds the record, the table, the pictures and the report.

    Example:
        >>> found = diffcache.evaluate(pipe, {"ours": schedule}, prompts, num_inference_steps=28)
        >>> found["ours"].psnr, found["ours"].seconds, found["ours"].speedup
        (53.2, 1.9, 2.6)
        >>> found.best(min_speedup=2).name
        'ours'
        >>> table = found.to_pandas()
    """

    record: JsonObject
    folder: Path

    @property
    def report(self) -> Path:
        """The path of the HTML report."""
        return self.folder / "report.html"

    def __getitem__(self, name: str) -> MethodResult:
        """Return the results of a method.

        Raises:
            UnknownName: If there is no method of that name. The error lists the names.
        """
        return results.result_of(self.record, name)

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names of the methods."""
        return iter(results.names(self.record))

    def best(self, metric: str | None = None, *, min_speedup: float | None = None) -> MethodResult:
        """Return the method with the best mean of a metric.

        The full run is left out. Of equal means, the faster method is returned.

        Args:
            metric: Name of the metric. None: the first metric of the evaluation, which is PSNR for pictures.
            min_speedup: Least speed-up of the sampling loop. None: any.

        Raises:
            UnknownName: If no method has a score by the metric.
            BadOption: If no method is as fast as ``min_speedup``.
        """
        return results.best(self.record, metric, min_speedup)

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per method: work, seconds, speed-up, memory and means of metrics.

        Raises:
            MissingPackageError: If pandas is not installed.
        """
        return results.to_pandas(self.record)

    def __str__(self) -> str:
        return markdown(self.record)

    def __repr__(self) -> str:
        methods, samples = len(self.record["methods"]), len(self.record["samples"])
        counted = f"{methods} method{'s' * (methods != 1)} on {samples} sample{'s' * (samples != 1)}"
        return printable(f"<Evaluation of {counted}, {self.record['pipeline']['class']}, in {str(self.folder)!r}>")

    def _repr_html_(self) -> str:
        """Return a card with a table of the results, for notebooks."""
        return card("Evaluation", repr(self)[1:-1].removeprefix("Evaluation of "), table=results.to_html(self.record))


def evaluate(
    pipe: Any,
    schedules: Mapping[str, Schedule] | Sequence[Method],
    calls: str | Mapping[str, Any] | Sequence[str] | Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] | None = None,
    scorers: Sequence[Scorer] = (),
    compare: Sequence[Method] | None = None,
    extra: Sequence[Method] = (),
    extractor: Extractor | str | None = None,
    real: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    profile: Profile | str | Path | None = None,
    trials: Trials | None = None,
    score: Score | None = None,
    out: str | Path = "evaluation",
    title: str = "",
    progress: bool | None = None,
    **common: Any,
) -> Evaluation | TextEvaluation:
    """Run ``pipe`` in full, with each schedule and with comparison methods, on the same calls, and write a report.

    The function measures seconds, operations and memory, compares the outputs, and writes a record, a table and a
    report to a folder. Seconds are those of single calls; the record holds their medians. A speed-up is the median over
    the calls of the ratio to the full run of the same call.

    Under ``torchrun``, each process takes its share of the calls. All processes use one folder. The first process
    measures sets and writes the report.

    For a loop around a language model, :func:`diffcache.eval.evaluate_text` compares the answers. ``compare`` and
    ``extra`` are further methods then, calls need no seed, and arguments about pictures and policies are refused.

    Args:
        pipe: A pipeline, a policy or a :class:`diffcache.Loop` that is not accelerated. It is left unchanged. For a
            loop, final states are compared.
        schedules: Name -> a schedule, a path, a Hub id or a rule; or a list of methods. Of a schedule set, its path or
            a dictionary by number of steps, the schedule for the steps of the calls is evaluated.
        calls: Prompts, or dictionaries of arguments for ``pipe(**call)``: one, or a list. Use prompts and seeds that
            were not used for calibration. The prompts get the seeds 0, 1, …; a dictionary holds one generator for each
            sample. All calls have one number of steps.
        metrics: Names of metrics in ``diffcache.eval.metrics`` that compare outputs with the full run's. None: PSNR,
            SSIM, latent error and state PSNR for pictures; action error and state PSNR for policies; latent error and
            state PSNR for loops. State PSNR is always measured if a schedule states its expected fidelity.
        scorers: Scorers of pictures and prompts; see ``diffcache.eval.metrics.scorer``.
        compare: Methods to compare with. None: for the computed steps of each schedule, as many steps without a cache,
            with the pipeline's own noise scheduler and with a better one, and uniform reuse.
        extra: Further methods in addition to ``compare``, for example other packages.
        extractor: Network for the Fréchet distance of sets: "inception", "efflite0", or an extractor of
            ``diffcache.eval.extractors``.
        real: A folder of real pictures, or a file of their statistics. None: the full run's pictures are the reference.
        options: Options of the metrics, by the name of the metric.
        profile: A profile of this loop. The report shows the error that it predicts together with the measured one.
        trials: A task for a policy. Every method plays the same episodes.
        score: For a language model, judges answers: ``score(call, ids)`` returns one bool for each row. None: answers
            are only compared with those of the full loop.
        out: The folder. A run that was stopped continues there, call by call. Results made with other settings are made
            again.
        title: Title of the report.
        progress: Whether to show a progress bar. None: on a terminal or in a notebook.
        **common: Arguments of the pipeline that are added to every call, such as ``num_inference_steps=28``.

    Returns:
        The record and the folder. Of a language model, a ``TextEvaluation``.

    Raises:
        BadOption: If an argument is not valid.
        Unusable: If an argument does not apply to ``pipe``.
        UnknownName: If there is no metric, option or extractor of a name.
        DiffCacheError: If :func:`diffcache.accelerate` or a metric raises it.

    Example:
        >>> prompts = ["a fox in the snow", "a red car"]
        >>> found = diffcache.evaluate(pipe, {"ours": schedule}, prompts, num_inference_steps=28)
        >>> found["ours"].psnr, found["ours"].speedup

        Of a language model, compare answers:

        >>> found = diffcache.evaluate(loop, {"dkv": "dkv:refresh=8"}, calls, score=is_right)
        >>> found["dkv"].exact, found["dkv"].same_answers, found["dkv"].speedup
    """
    if host.language_model_of(pipe) is not None:
        refused = (metrics, extractor, real, options, profile, trials)
        names = ("metrics", "extractor", "real", "options", "profile", "trials")
        given = {name: value is not None for name, value in zip(names, refused, strict=True)}
        _refuse({**given, "scorers": bool(scorers), "title": bool(title)})
        loop = host.adopted(pipe)
        demand_loop(loop)
        calls = host.calls_of(loop, calls, common, evaluate)
        methods = _token_methods(schedules, [*(compare or ()), *extra])
        return evaluate_text(loop, methods, calls, score=score, out=out, progress=progress)
    if score is not None:
        raise Unusable("score", "it judges answers of language models", "Leave out score; scorers judge pictures")
    subject = Subject.of(pipe)
    pipe, traits = subject.pipe, subject.traits
    calls = host.calls_of(pipe, calls, common, evaluate)
    host.check_calls(pipe, calls, repeatable=True)
    for call in calls:
        host.digest_of_call(call)
    check_title(title)
    check_names(metrics)
    check_folder("out", out)
    if trials is not None and not traits.plays_episodes:
        raise Unusable("trials", f"a {subject.title} plays no episodes", "Leave out trials, or pass a policy")
    known = Profile.load(profile) if isinstance(profile, (str, Path)) else profile
    mine = _methods(schedules)
    sources = [one for m in mine if m.source is not None for one in members(m.source).values()]
    promising = any(getattr(source, "expected", None) is not None for source in sources)
    wanted = dict.fromkeys([*(metrics or traits.metrics), *([PROMISED_IN] if promising else [])])
    check_outputs(subject.title, traits, calls, metrics or traits.metrics, extractor, scorers)
    judges, about = judges_of(tuple(wanted), scorers, options or {}, returns_states=traits.returns == "state")
    named = [full(), *mine, *(compare or ()), *extra]
    check_kinds(named)
    subject.check_methods(named, calls)
    sets = sets_of(extractor, real)
    for one in (judges, *mine, *(compare or ()), *extra, *((trials,) if trials else ())):
        _ = one.digest  # raises if a later run could not recognise the results
    me, folder = subject.identity(), EvaluationFolder(Path(out))
    folder.claim(subject.origin, host.digest_of(me))
    steps = subject.steps(calls)
    several = [method.name for method in (*mine, *extra) if isinstance(method.source, BySteps)]
    mine, extra = ([method.for_steps(steps) for method in given] for given in (mine, extra))
    subject.check_methods([method for method in (*mine, *extra) if method.name in several], calls)
    check_counted(mine, steps)
    compare = subject.baselines(mine, calls[0], steps) if compare is None else compare
    methods = [full(), *mine, *(method.for_steps(steps) for method in compare), *extra]
    check_kinds(methods)
    subject.check_methods(methods, ())
    folder.prepare([slug(method.name) for method in methods])
    found, rank, processes = _run(subject, methods, calls, steps, judges, folder, me, shows_progress(progress))
    played: dict[str, list[float]] = {}
    if trials and rank == 0:
        played = {m.name: trials.outcomes(pipe, m, host.digest_of([m.digest, me]), folder) for m in methods}
    about |= {tried.NAME: tried.ABOUT} if played else {}
    more, distances = sets.measured(methods, found, folder) if sets and rank == 0 else ({}, {})
    told = {
        "title": title or f"{subject.title}, {steps} steps",
        "circumstances": circumstances(next(iter(subject.networks.values()))) | {"processes": processes},
        "pipeline": subject.in_record(calls[0], steps),
        "warning": enough(sum(len(p["prompts"]) for p in found if p["method"] == methods[0].name)),
    }
    foreseen = {} if known is None else _foreseen(known, mine)
    record = assembled(methods, found, about | more, steps, told, distances, foreseen, played)
    return write(record, folder.path) if rank == 0 else Evaluation(record, folder.path)


def _refuse(given: Mapping[str, bool]) -> None:
    """Raise Unusable for the first argument that is given and does not apply to language models."""
    for name in (name for name, is_given in given.items() if is_given):
        raise Unusable(name, "it does not apply to language models", f"Leave out {name}")


def _token_methods(schedules: object, more: Sequence[Method]) -> Any:
    """Return methods for ``evaluate_text``, which checks them: the schedules, and further methods."""
    if not more:
        return schedules
    if isinstance(schedules, Mapping):
        return [*(token_method(name, rule) for name, rule in schedules.items()), *more]
    return [*schedules, *more] if isinstance(schedules, Sequence) and not isinstance(schedules, str) else schedules


def write(record: JsonObject, folder: Path) -> Evaluation:
    """Write the record, the table and the report of an evaluation to the folder that holds its pictures."""
    files.make_folder(folder)
    files.write(folder / "record.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    files.write(folder / "table.md", markdown(record) + "\n")
    write_html(record, folder, folder / "report.html")
    return Evaluation(record, folder)


def again(folder: str | Path) -> Evaluation:
    """Write the table and the report of the record in a folder again.

    Raises:
        DocumentError: If the record is missing or not valid.
    """
    return write(read(Path(folder) / "record.json"), Path(folder))


def _methods(schedules: Mapping[str, Schedule] | Sequence[Method]) -> list[Method]:
    if isinstance(schedules, Mapping):
        return [ours(name, source) for name, source in schedules.items()]
    if isinstance(schedules, (str, Path, CacheSchedule, ScheduleSet, Rule)) or not isinstance(schedules, Sequence):
        raise Unusable(
            "schedules",
            f"it is a {type(schedules).__name__}",
            "Pass a dictionary of names and schedules, or a list of methods",
        )
    return list(schedules)


def _run(
    subject: Subject,
    methods: Sequence[Method],
    calls: Sequence[Mapping[str, Any]],
    steps: int,
    judges: Judges,
    folder: EvaluationFolder,
    me: Mapping[str, str],
    progress: bool,
) -> tuple[list[Part], int, int]:
    """Return all parts, the rank of this process, and the number of processes."""
    here, many = 0, 1

    def share(rank: int, size: int) -> bytes:
        nonlocal here, many
        here, many = rank, size
        if size > 1:
            demand_own_generators(calls)
        part = [(index, call) for index, call in enumerate(calls) if index % size == rank]
        shown = progress and rank == 0
        return json.dumps(run_share(subject, methods, part, steps, judges, folder, me, progress=shown)).encode()

    return [part for data in all_shares(share) for part in json.loads(data)], here, many


def judges_of(
    names: Sequence[str],
    scorers: Sequence[Scorer],
    options: Mapping[str, Mapping[str, Any]],
    *,
    returns_states: bool = False,
) -> tuple[Judges, dict[str, dict[str, Any]]]:
    """Return the metrics and scorers with these names, and their descriptions for the record.

    Args:
        names: Names of metrics.
        scorers: Scorers of pictures and prompts.
        options: Options of the metrics, by the name of the metric.
        returns_states: Whether the outputs are final states, as for a loop. Metrics of states then compare the outputs.

    Raises:
        BadOption: If options are given for a metric that is not in ``names``, or two names are the same.
        UnknownName: If there is no such metric or option.
    """
    about: dict[str, dict[str, Any]] = {}  # metric or scorer -> its description in the record
    pairs: dict[str, Compare] = {}
    latents: dict[str, Compare] = {}
    for unknown in options.keys() - set(names):
        raise BadOption("options", unknown, f"options of the metrics asked for: {', '.join(names)}")
    for name in names:
        found = metric_room.check(name, **options.get(name, {}))
        about[name] = found.ABOUT.in_record | {"floor": None, "of_pairs": True}
        where = latents if found.ABOUT.on_states and not returns_states else pairs
        where[name] = functools.partial(metric_room.score, name, **options.get(name, {}))
    for one in scorers:
        if one.name in about:
            raise BadOption("scorers", one.name, "names that no metric and no other scorer has")
        about[one.name] = one.about.in_record | {"floor": None, "of_pairs": False}
    return Judges(pairs, latents, {one.name: one for one in scorers}), about


def _foreseen(known: Profile, methods: Sequence[Method]) -> dict[str, np.ndarray]:
    """Return the predicted mean squared errors of the states, for schedules that can be simulated on the profile."""
    found: dict[str, np.ndarray] = {}
    if known.dynamics is None:
        return found
    simulator = Simulator(known.dynamics)
    for method in methods:
        made = method.source
        if not isinstance(made, CacheSchedule) or made.sigmas is not None or made.steps != known.steps:
            continue
        plans = {site: plan for _, site, plan in made.plans()}
        run = simulator.played(plans["model"]) if set(plans) == {"model"} and len(made.denoisers) == 1 else None
        if run is not None:
            found[method.name] = simulator.along(run)
    return found
