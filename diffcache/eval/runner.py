"""Run every method on every call, and put down what came of it, file by file: a run that is stopped goes on there."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcache import host
from diffcache.api import report
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.methods import Method
from diffcache.eval.metrics import span
from diffcache.eval.plausible import Due, Part
from diffcache.eval.saved_parts import EvaluationFolder, Exact, pictures_in, slug
from diffcache.eval.timed_run import TimedRun, watched
from diffcache.host.digest import TO_DIGEST, NoDigestError
from diffcache.profiling.recording import with_copied_generators

CLOSE = ("flops", "errors", "sizes")  # of a part: what the method did on the first call

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (found, reference) -> a number for every sample
Rate = Callable[[np.ndarray, Sequence[str]], np.ndarray]  # (pictures, prompts) -> a number for every sample


@dataclass(frozen=True, slots=True)
class Judges:
    """What is said of every sample.

    pairs    of outputs with the full run's
    latents  of last states with the full run's
    rates    of outputs and what was asked for
    """

    pairs: Mapping[str, Compare]
    latents: Mapping[str, Compare]
    rates: Mapping[str, Rate]

    @property
    def digest(self) -> str:
        """Return a digest of all judges: code, options, weights, and the content of files that options name.

        Raises:
            BadOption: A judge cannot be recognised in a later run.
        """
        judges = {**self.pairs, **self.latents, **self.rates}
        try:
            return host.digest_of({name: (judge, _files(judge)) for name, judge in judges.items()})
        except NoDigestError as error:
            name, _, where = error.where.partition("[")
            raise BadOption(
                "scorers",
                f"{name} with {error.what} at [{where}",
                f"judges that can be recognised in a later run. Give the object {TO_DIGEST}",
            ) from None


def _files(judge: Any) -> dict[str, str]:
    """Return digests of the files that the options of a metric name."""
    options = getattr(judge, "keywords", {})
    paths = {name: Path(value) for name, value in options.items() if isinstance(value, (str, Path))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.is_file()}


def run_share(
    pipe: Any,
    methods: Sequence[Method],
    calls: Sequence[tuple[int, Mapping[str, Any]]],
    steps: int,
    judges: Judges,
    folder: EvaluationFolder,
    known: Mapping[str, str],
    *,
    progress: bool,
) -> list[Part]:
    """Parts of all methods and of these calls (with their places among all), from the folder or made now.

    Call by call, all methods one after the other, so that a machine that grows slower does so for all. A method runs
    once in this process before it is timed; then its operations and states are looked at, on the first call.

    ``known`` is the :func:`identity` of the pipeline.
    """
    found: list[Part] = []
    close = _Close(pipe, calls[0][1]) if calls else None
    here = host.digest_of({"pipeline": known, "steps": steps, "judges": judges.digest})
    keys = {method.name: method.digest for method in methods}
    digests = {index: host.digest_of_call(numeric(pipe, call)) for index, call in calls}
    with tqdm(total=len(calls) * len(methods), desc="evaluate", unit="run", disable=not progress) as bar:
        for index, call in calls:
            assert close is not None
            asked = numeric(pipe, call)
            name, told = f"{index:04d}", digests[index]
            reference = host.digest_of({"call": told, "here": here})
            exact = folder.find_exact(name, reference)
            for method in methods:
                key = host.digest_of({"method": keys[method.name], "call": told, "here": here})
                where = slug(method.name)
                part = folder.find(where, name, _due(key, method, index, call, exact.output, judges)) if exact else None
                if part is not None:
                    close.known[method.name] = {name: part[name] for name in CLOSE}
                else:
                    folder.forget(where, name)  # a part never stands beside the pictures of another run
                    seen = close.of(method)
                    with _on(pipe, method):
                        run = watched(pipe, {**asked, **method.change})
                        cache, schedule = _of_our_own(pipe, method)
                    if method.kind == "full":
                        exact = Exact(run.output, run.latent)
                        folder.keep_exact(name, exact, reference)
                    assert exact is not None  # the full run comes first
                    part = {
                        "key": key,
                        "method": method.name,
                        "call": index,
                        "prompts": prompts_of(call, len(run.output)),
                    }
                    part |= {
                        "seeds": seeds_of(call, len(run.output)),
                        **seen,
                        "cache_bytes": cache,
                        "schedule": schedule,
                    }
                    part |= {"seconds": {"loop": run.loop_s, "pipeline": run.pipeline_s}, "peak_bytes": run.peak_bytes}
                    part["scores"] = _scores(method, run, exact, part["prompts"], judges)
                    part["pictures"] = folder.keep_pictures(where, name, run.output)
                    folder.keep(where, name, part)
                found.append(part)
                bar.update()
    return found


def _due(key: str, method: Method, index: int, call: Mapping[str, Any], output: np.ndarray, judges: Judges) -> Due:
    """What a part of this method and call must say, given the ``output`` of the full run."""
    samples = len(output)
    return Due(
        key=key,
        method=method.name,
        call=index,
        prompts=prompts_of(call, samples),
        seeds=seeds_of(call, samples),
        scores={
            **{name: span(name) for name in (*judges.pairs, *judges.latents)},
            **dict.fromkeys(judges.rates, (-math.inf, math.inf)),
        },
        optional=frozenset(judges.latents),
        scheduled=method.source is not None,
        pictures=pictures_in(output),
    )


@contextlib.contextmanager
def _on(pipe: Any, method: Method) -> Iterator[None]:
    """Put a method on, after a look at whether the one before came off: else it would act on all that follow."""
    host.demand_full_run(pipe)
    with method.on(pipe):
        yield


def numeric(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with pictures given back as arrays, where the pipeline can be told; latents stay latents."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "output_type" not in known or call.get("output_type") == "latent":
        return dict(call)
    return {**call, "output_type": "np"}


def prompts_of(call: Mapping[str, Any], samples: int) -> list[str]:
    """What every sample was asked for, as text; "" where it cannot be told."""
    asked = call.get("prompt", call.get("class_labels", ""))
    each = [asked] if isinstance(asked, str) or not isinstance(asked, Sequence) else list(asked)
    per = max(1, samples // max(1, len(each)))
    texts = [str(text) for text in each for _ in range(per)]
    return (texts + [""] * samples)[:samples]


def seeds_of(call: Mapping[str, Any], samples: int) -> list[int | None]:
    given = call.get("generator")
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    seeds = [g.initial_seed() if isinstance(g, torch.Generator) else None for g in each]
    return (seeds * samples)[:samples] if len(seeds) == 1 else (seeds + [None] * samples)[:samples]


def steps_of(pipe: Any, call: Mapping[str, Any]) -> int:
    """Steps that a call asks for. BadOption where it does not say."""
    if not host.traits(pipe).asks_for_steps:
        return _counted(pipe, call)
    steps = host.steps_asked(pipe, call)
    if steps is None:
        raise BadOption("calls", json.dumps(sorted(call)), "calls that say num_inference_steps")
    return steps


def _counted(loop: Any, call: Mapping[str, Any]) -> int:
    """Return the steps of a loop whose calls do not say them. This runs the loop once."""
    steps: list[int] = []

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            steps.append(run.steps)

    watcher = host.LoopWatcher(loop, Observer())
    watcher.attach()
    try:
        with torch.no_grad():
            loop(**{name: with_copied_generators(value) for name, value in call.items()})
    finally:
        watcher.detach()
    if len(set(steps)) != 1:
        raise BadOption(
            "sample", f"{len(steps)} trajectories", "one run of the loop: with diffcache.trajectory(…) in it"
        )
    return steps[0]


def identity(pipe: Any) -> dict[str, str]:
    """Return what a pipeline is recognised by, as :func:`host.identity` does.

    A part that has no digest is warned of and stands for itself alone: nothing of it is found again.
    """
    return host.identity(pipe, _alone)


def _alone(name: str, reason: NoDigestError) -> str:
    warnings.warn(
        f"evaluate cannot recognise this pipeline in a later run: its {name} has {reason.what} at "
        f"{reason.where or 'the top'}. All runs are made now, and made again next time. Give the object {TO_DIGEST} to "
        "keep them.",
        stacklevel=5,
    )
    return uuid.uuid4().hex


class _Close:
    """What each method does on one call, looked at closely, once; its run also warms up."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.call = numeric(pipe, call)
        self.known: dict[str, Part] = {}
        self._full: TimedRun | None = None
        self._warm: set[str] = set()

    def of(self, method: Method) -> Part:
        """Operations, how far each state lies from the full run's, relative L2, and of the full run's states the root
        mean squares. Where a run before this one has looked already, the method is warmed up all the same."""
        if method.name in self.known and method.name not in self._warm:
            with _on(self.pipe, method):
                watched(self.pipe, {**self.call, **method.change})
        self._warm.add(method.name)
        if method.name not in self.known:
            if self._full is None:
                self._full = watched(self.pipe, self.call, closely=True)
            with _on(self.pipe, method):
                seen = watched(self.pipe, {**self.call, **method.change}, closely=True)
            errors = None
            if seen.states and [s.shape for s in seen.states] == [s.shape for s in self._full.states]:
                pairs = zip(seen.states, self._full.states, strict=True)
                errors = [_finite(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)) for a, b in pairs]
            sizes = [float(np.sqrt(np.square(s, dtype=np.float64).mean())) for s in self._full.states]
            self.known[method.name] = {"flops": seen.flops, "errors": errors, "sizes": sizes}
        return self.known[method.name]


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _scores(method: Method, run: TimedRun, exact: Exact, prompts: list[str], judges: Judges) -> dict[str, list[float]]:
    output, latent = exact.output, exact.latent
    if run.output.shape != output.shape:
        raise DiffCacheError(
            f"{method.name!r} gave outputs of shape {list(run.output.shape)}, the full run {list(output.shape)}: "
            "they cannot be compared. Compare methods that draw the same."
        )
    found = {name: compare(run.output, output) for name, compare in judges.pairs.items()}
    if latent is not None and run.latent is not None and run.latent.shape == latent.shape:
        # Both guidance branches may go through the noise scheduler (DiT): the states of the samples come first.
        n = len(output)
        if len(latent) >= n:
            found |= {name: compare(run.latent[:n], latent[:n]) for name, compare in judges.latents.items()}
    found |= {name: rate(run.output, prompts) for name, rate in judges.rates.items()}
    return {name: [float(v) for v in values] for name, values in found.items()}


def _of_our_own(pipe: Any, method: Method) -> tuple[int | None, Any]:
    """Bytes that our store held at most, and the schedule that ran, where it was one of ours; peers do not say."""
    if method.source is None:
        return (0 if method.kind in ("full", "fewer steps") else None), None
    ran = report(pipe)
    if ran.schedule is None:
        return 0, None
    strips = {(row.denoiser, row.site): row.strip for row in ran.rows if row.branch == 0}
    return ran.peak_bytes, _told(ran.schedule, strips)


def _told(schedule: CacheSchedule, strips: Mapping[tuple[str, str], str]) -> Any:
    """Masks as they were carried out, and formats. A site that runs several times in a step has its planned mask."""

    def mask(denoiser: str, site: str, planned: np.ndarray) -> list[int]:
        strip = strips.get((denoiser, site), "")
        return [int(s == "■") for s in strip] if len(strip) == len(planned) else [int(c) for c in planned]

    return {
        "denoisers": {
            name: {
                site: {"compute": mask(name, site, plan.compute), "store": plan.store}
                for site, plan in denoiser.sites.items()
            }
            for name, denoiser in schedule.denoisers.items()
        }
    }
