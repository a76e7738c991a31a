"""Run every method on every call, and put down what came of it, file by file: a run that is stopped goes on there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcache.api import executor_of
from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.methods import Method
from diffcache.eval.parts import Folder, Part, digest_of, slug
from diffcache.eval.watch import Run, watched
from diffcache.reports import report_of
from diffcache.schedule import CacheSchedule

CLOSE = ("flops", "errors")  # of a part: what the method did on the first call

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
    def names(self) -> list[str]:
        return sorted({*self.pairs, *self.latents, *self.rates})


def run_share(
    pipe: Any,
    methods: Sequence[Method],
    calls: Sequence[tuple[int, Mapping[str, Any]]],
    judges: Judges,
    folder: Folder,
    *,
    progress: bool,
) -> list[Part]:
    """Parts of all methods and of these calls (with their places among all), from the folder or made now.

    Call by call, all methods one after the other, so that a machine that grows slower does so for all. A method runs
    once before it is timed; then its operations and states are looked at, on the first call of this process.
    """
    found: list[Part] = []
    close = _Close(pipe, calls[0][1]) if calls else None
    bar = tqdm(total=len(calls) * len(methods), desc="evaluate", unit="run", disable=not progress)
    for index, call in calls:
        assert close is not None
        asked = numeric(pipe, call)
        name, told = f"{index:04d}", digest_of(asked)
        for method in methods:
            key = digest_of({"method": method.digest, "call": told, "judges": judges.names})
            where = slug(method.name)
            part = folder.find(where, name, key)
            if part is not None and (method.kind != "full" or folder.has_exact(name)):
                close.known[method.name] = {name: part[name] for name in CLOSE}
            else:
                seen = close.of(method)
                with method.on(pipe):
                    run = watched(pipe, {**asked, **method.change})
                    cache, schedule = _of_our_own(pipe, method)
                if method.kind == "full":
                    folder.keep_exact(name, run)
                part = {"key": key, "method": method.name, "call": index, "prompts": prompts_of(call, len(run.output))}
                part |= {"seeds": seeds_of(call, len(run.output)), **seen, "cache_bytes": cache, "schedule": schedule}
                part |= {"seconds": {"loop": run.loop_s, "pipeline": run.pipeline_s}, "peak_bytes": run.peak_bytes}
                part["scores"] = _scores(method, run, folder.exact(name), part["prompts"], judges)
                part["pictures"] = folder.keep_pictures(where, name, run.output)
                folder.keep(where, name, part)
            found.append(part)
            bar.update()
    bar.close()
    return found


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
    default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    steps = call.get("num_inference_steps", None if default is None else default.default)
    if not isinstance(steps, int):
        raise BadOption("calls", json.dumps(sorted(call)), "calls that say num_inference_steps")
    return steps


class _Close:
    """What each method does on one call, looked at closely, once; its run also warms up."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.call = numeric(pipe, call)
        self.known: dict[str, Part] = {}
        self._full: Run | None = None

    def of(self, method: Method) -> Part:
        """Operations, and how far each state lies from the full run's, relative L2."""
        if method.name not in self.known:
            if self._full is None:
                self._full = watched(self.pipe, self.call, closely=True)
            with method.on(self.pipe):
                seen = watched(self.pipe, {**self.call, **method.change}, closely=True)
            errors = None
            if seen.states and [s.shape for s in seen.states] == [s.shape for s in self._full.states]:
                pairs = zip(seen.states, self._full.states, strict=True)
                errors = [float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)) for a, b in pairs]
            self.known[method.name] = {"flops": seen.flops, "errors": errors}
        return self.known[method.name]


def _scores(
    method: Method, run: Run, exact: tuple[np.ndarray, np.ndarray | None], prompts: list[str], judges: Judges
) -> dict[str, list[float]]:
    output, latent = exact
    if run.output.shape != output.shape:
        raise DiffCacheError(
            f"{method.name!r} gave outputs of shape {list(run.output.shape)}, the full run {list(output.shape)}: "
            "they cannot be compared. Compare methods that draw the same."
        )
    found = {name: compare(run.output, output) for name, compare in judges.pairs.items()}
    if latent is not None and run.latent is not None and run.latent.shape == latent.shape:
        found |= {name: compare(run.latent, latent) for name, compare in judges.latents.items()}
    found |= {name: rate(run.output, prompts) for name, rate in judges.rates.items()}
    return {name: [float(v) for v in values] for name, values in found.items()}


def _of_our_own(pipe: Any, method: Method) -> tuple[int | None, Any]:
    """Bytes that our store held at most, and the schedule that ran, where it was one of ours; peers do not say."""
    if method.source is None:
        return (0 if method.kind in ("full", "fewer steps") else None), None
    executor = executor_of(pipe)
    ran = None if executor.last is None else executor.last.schedule
    return report_of(executor).peak_bytes, None if ran is None else _told(ran)


def _told(schedule: CacheSchedule) -> Any:
    """Masks and formats, as the record has them."""
    return {
        "denoisers": {
            name: {
                site: {"compute": [int(c) for c in plan.compute], "store": plan.store}
                for site, plan in denoiser.sites.items()
            }
            for name, denoiser in schedule.denoisers.items()
        }
    }
