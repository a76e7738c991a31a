"""Run every method on every call and save each result to a file, so that a stopped run can continue."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import DiffCacheError, Unusable
from diffcache.eval.methods import Method
from diffcache.eval.metrics import span
from diffcache.eval.plausible import Due, Part
from diffcache.eval.saved_parts import EvaluationFolder, Exact, pictures_in, slug
from diffcache.eval.subject import Subject
from diffcache.eval.timed_run import TimedRun, watched
from diffcache.executor.report import Report, report_of
from diffcache.host.digest import TO_DIGEST, NoDigestError

CLOSE = ("flops", "errors", "sizes")  # fields of a part that are measured on the first call

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (found, reference) -> a number for every sample
Rate = Callable[[np.ndarray, Sequence[str]], np.ndarray]  # (pictures, prompts) -> a number for every sample


@dataclass(frozen=True, slots=True)
class Judges:
    """The functions that score every sample.

    Attributes:
        pairs: Compare outputs with those of the full run.
        latents: Compare final states with those of the full run.
        rates: Score outputs by themselves and their prompts.
    """

    pairs: Mapping[str, Compare]
    latents: Mapping[str, Compare]
    rates: Mapping[str, Rate]

    @property
    def digest(self) -> str:
        """A digest of all judges: code, options, weights, and the content of files that options name.

        Raises:
            BadOption: If a judge cannot be recognised in a later run.
        """
        judges = {**self.pairs, **self.latents, **self.rates}
        try:
            return host.digest_of({name: (judge, _files(judge)) for name, judge in judges.items()})
        except NoDigestError as error:
            name, _, where = error.where.partition("[")
            raise Unusable(
                "scorers",
                f"a later run cannot recognise {name}, which has {error.what} at [{where}",
                f"Give the object {TO_DIGEST}",
            ) from None


def _files(judge: Any) -> dict[str, str]:
    """Return digests of the files that the options of a metric name."""
    options = getattr(judge, "keywords", {})
    paths = {name: Path(value) for name, value in options.items() if isinstance(value, (str, Path))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.is_file()}


def run_share(
    subject: Subject,
    methods: Sequence[Method],
    calls: Sequence[tuple[int, Mapping[str, Any]]],
    steps: int,
    judges: Judges,
    folder: EvaluationFolder,
    known: Mapping[str, str],
    *,
    progress: bool,
) -> list[Part]:
    """Return the parts of all methods for these calls, from the folder or from new runs.

    For each call, all methods run one after the other, so that a machine that becomes slower affects all of them. Each
    method runs once on the first call before it is timed. In that run its operations and states are measured.

    Args:
        subject: The pipeline, without a cache.
        methods: The methods, with the full run first.
        calls: The calls of this process, with their indices among all calls.
        steps: Number of steps of the full run.
        judges: The metrics and scorers.
        folder: The folder of the evaluation.
        known: The identity of the pipeline.
        progress: Whether to show a progress bar.

    Raises:
        DiffCacheError: If a method returns outputs of another shape than the full run.
    """
    found: list[Part] = []
    close = _Close(subject, calls[0][1]) if calls else None
    here = host.digest_of({"pipeline": known, "steps": steps, "judges": judges.digest})
    keys = {method.name: method.digest for method in methods}
    digests = {index: host.digest_of_call(subject.numeric(call)) for index, call in calls}
    with tqdm(total=len(calls) * len(methods), desc="evaluate", unit="run", disable=not progress) as bar:
        for index, call in calls:
            assert close is not None
            asked = subject.numeric(call)
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
                    folder.forget(where, name)  # a part must not remain with the pictures of another run
                    seen = close.of(method)
                    with subject.on(method) as pipe:
                        run = watched(pipe, {**asked, **method.change})
                        executor = subject.bound.executor
                        ran = None if method.source is None or executor is None else report_of(executor)
                    cache, schedule = _of_our_own(method, ran)
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
    """Return the required content of a part of this method and call, given the ``output`` of the full run."""
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


def prompts_of(call: Mapping[str, Any], samples: int) -> list[str]:
    """Return the prompt or the class of every sample as text; "" if it is not known."""
    asked = call.get("prompt", call.get("class_labels", ""))
    each = [asked] if isinstance(asked, str) or not isinstance(asked, Sequence) else list(asked)
    per = max(1, samples // max(1, len(each)))
    texts = [str(text) for text in each for _ in range(per)]
    return (texts + [""] * samples)[:samples]


def seeds_of(call: Mapping[str, Any], samples: int) -> list[int | None]:
    """Return the seed of every sample: of its generator, or of the call; None if it is not known."""
    given = call.get("generator")
    if given is None and host.is_count(call.get("seed"), 0):
        return [int(call["seed"])] * samples
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    seeds = [g.initial_seed() if isinstance(g, torch.Generator) else None for g in each]
    return (seeds * samples)[:samples] if len(seeds) == 1 else (seeds + [None] * samples)[:samples]


class _Close:
    """The operations and states of each method on one call, measured once. The measured run is also the warm-up."""

    def __init__(self, subject: Subject, call: Mapping[str, Any]) -> None:
        self.subject = subject
        self.call = subject.numeric(call)
        self.known: dict[str, Part] = {}
        self._full: TimedRun | None = None
        self._warm: set[str] = set()

    def of(self, method: Method) -> Part:
        """Return the operations and the state errors of a method.

        ``errors`` holds the relative L2 distance of each state from the full run's, and ``sizes`` the root mean square
        of each state of the full run. If an earlier process has measured the method, this process only runs it once as
        a warm-up.
        """
        if method.name in self.known and method.name not in self._warm:
            with self.subject.on(method) as pipe:
                watched(pipe, {**self.call, **method.change})
        self._warm.add(method.name)
        if method.name not in self.known:
            if self._full is None:
                self._full = watched(self.subject.pipe, self.call, closely=True)
            with self.subject.on(method) as pipe:
                seen = watched(pipe, {**self.call, **method.change}, closely=True)
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


def _of_our_own(method: Method, ran: Report | None) -> tuple[int | None, Any]:
    """Return the most bytes that the cache held, and the schedule that ran. Each is None if it is not known.

    Args:
        method: The method.
        ran: What its last run did. None if it has no schedule of this library.
    """
    if ran is None:
        return (0 if method.kind in ("full", "fewer steps") else None), None
    if ran.schedule is None:
        return 0, None
    strips = {(row.denoiser, row.site): row.strip for row in ran.rows if row.branch == 0}
    return ran.peak_bytes, _told(ran.schedule, strips)


def _told(schedule: CacheSchedule, strips: Mapping[tuple[str, str], str]) -> Any:
    """Return the masks as they were executed, and the formats.

    A site that runs several times in a step has its planned mask.
    """

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
