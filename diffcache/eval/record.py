"""Assemble and read the record of an evaluation: a JSON object that tables and reports are made from."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import statistics as stats
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffcache.documents import files
from diffcache.documents.checks import refuse
from diffcache.documents.document import version_of
from diffcache.eval import trials
from diffcache.eval.distribution import Distance
from diffcache.eval.fields import demand_fields
from diffcache.eval.methods import FULL, Method
from diffcache.eval.plausible import Part
from diffcache.eval.statistics import FEW, Interval, Verdict, interval, verdict, verdict_of_sets

WHOLE = 0.02  # in steps; smaller excesses over a whole number come from small layers and from counting
FORMAT = "diffcache.evaluation"
VERSION = 2

JsonObject = dict[str, Any]


def assembled(
    methods: Sequence[Method],
    parts: Sequence[Part],
    metrics: Mapping[str, Mapping[str, Any]],
    steps: int,
    about: Mapping[str, Any],
    distances: Mapping[str, Mapping[str, Distance]],
    foreseen: Mapping[str, np.ndarray],
    played: Mapping[str, Sequence[float]],
) -> JsonObject:
    """Return the record of an evaluation.

    Args:
        methods: The methods, with the full run among them.
        parts: The parts of all methods and calls.
        metrics: Metric -> title, unit, better, about, floor.
        steps: Number of steps of the full run.
        about: Title, circumstances and pipeline.
        distances: Method -> metric of sets -> its distance.
        foreseen: Method -> mean squared error of the state after each step that a profile predicts, float64 [T].
        played: Method -> 1 for success or 0, for each episode of a task.
    """
    by_method = {m.name: sorted((p for p in parts if p["method"] == m.name), key=lambda p: p["call"]) for m in methods}
    full = by_method[FULL]
    ids = [f"{p['call']:04d}-{n:02d}" for p in full for n in range(len(p["prompts"]))]
    prompts = [prompt for p in full for prompt in p["prompts"]]
    seeds = [seed for p in full for seed in p["seeds"]]
    told = [
        _method(m, by_method[m.name], full, ids, steps, distances.get(m.name, {}), foreseen.get(m.name))
        for m in methods
    ]
    for method in told:
        if method["name"] in played:
            method["scores"][trials.NAME] = _score(played[method["name"]], trials.wilson)
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "samples": [
            {"id": i, "prompt": prompt, "seed": seed} for i, prompt, seed in zip(ids, prompts, seeds, strict=True)
        ],
        "metrics": {name: dict(found) for name, found in metrics.items()},
        "methods": _judged(told, metrics, distances),
    }


def _method(
    method: Method,
    parts: Sequence[Part],
    full: Sequence[Part],
    ids: Sequence[str],
    steps: int,
    distances: Mapping[str, Distance],
    foreseen: np.ndarray | None,
) -> JsonObject:
    fraction = None
    if parts[0]["flops"] and full[0]["flops"]:
        fraction = parts[0]["flops"] / full[0]["flops"]
    pictures = [path for p in parts for path in p["pictures"]]
    caches = [p["cache_bytes"] for p in parts if p["cache_bytes"] is not None]
    peaks = [p["peak_bytes"] for p in parts if p["peak_bytes"] is not None]
    errors = parts[0]["errors"]
    taken = method.change.get("num_inference_steps", steps)
    return {
        "name": method.name,
        "kind": method.kind,
        "detail": method.detail,
        "steps": taken,
        "computed_steps": round(steps * fraction, 3) if fraction is not None else taken,
        "seconds": {part: _spread([p["seconds"][part] for p in parts]) for part in ("loop", "pipeline")},
        "speedup": {part: _speedup(parts, full, part) for part in ("loop", "pipeline")},
        "flops_fraction": fraction,
        "cache_bytes": max(caches) if caches else None,
        "peak_bytes": max(peaks) if peaks else None,
        "scores": {**_scores(parts), **{name: _of_sets(found) for name, found in distances.items()}},
        "promised": _promised(method),
        "schedule": parts[0]["schedule"] if method.kind == "ours" else None,
        "trajectory": None
        if errors is None or method.kind == "full"
        else {
            "steps": list(range(len(errors))),
            "measured": errors,
            "expected": _relative(foreseen, parts[0]["sizes"]),
        },
        "pictures": dict(zip(ids, pictures, strict=True)) if len(pictures) == len(ids) else None,
        "note": "",
    }


def _promised(method: Method) -> JsonObject | None:
    """Return the fidelity that a schedule states, in the quantity that the metric "state" measures."""
    expected = getattr(method.source, "expected", None)
    return None if expected is None else dataclasses.asdict(expected)


def _relative(foreseen: np.ndarray | None, sizes: Sequence[float]) -> list[float] | None:
    """Return the predicted errors relative to the full run's states, as the measured errors are."""
    if foreseen is None or len(foreseen) != len(sizes):
        return None
    return [float(np.sqrt(square) / max(size, 1e-30)) for square, size in zip(foreseen, sizes, strict=True)]


def _spread(seconds: Sequence[float]) -> JsonObject:
    """Return the median and the quartiles over the calls."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return {"median": stats.median(seconds), "low": float(low), "high": float(high), "runs": len(seconds)}


def _speedup(parts: Sequence[Part], full: Sequence[Part], what: str) -> float:
    """Return the median over the calls of the full run's seconds divided by those of this method in the same call."""
    ratios = [f["seconds"][what] / max(p["seconds"][what], 1e-9) for p, f in zip(parts, full, strict=True)]
    return float(stats.median(ratios))


def _scores(parts: Sequence[Part]) -> dict[str, JsonObject]:
    found = {}
    for name in parts[0]["scores"]:
        if all(name in p["scores"] for p in parts):
            found[name] = _score([v for p in parts for v in p["scores"][name]], interval)
    return found


def _score(values: Sequence[float], by: Callable[[Sequence[float]], Interval]) -> JsonObject:
    mean, low, high = by(values)
    return {"mean": mean, "low": low, "high": high, "values": list(values), "verdicts": []}


def _of_sets(found: Distance) -> JsonObject:
    low, high = (found.spread.low, found.spread.high) if found.spread else (found.value, found.value)
    return {"mean": found.value, "low": low, "high": high, "values": None, "verdicts": []}


def _judged(
    methods: list[JsonObject],
    metrics: Mapping[str, Mapping[str, Any]],
    distances: Mapping[str, Mapping[str, Distance]],
) -> list[JsonObject]:
    """Add verdicts to the methods if there are at least FEW samples, and return the methods.

    For metrics that do not compare with the full run, every other method is judged against the full run. A method of
    kind "ours" is also judged against the best of the other methods that compute no more than it does, with its
    fraction of a step rounded up.
    """
    (full,) = [m for m in methods if m["kind"] == "full"]
    others = [m for m in methods if m["kind"] not in ("full", "ours")]

    def judge(mine: JsonObject, rival: JsonObject, name: str, about: Mapping[str, Any]) -> Verdict | None:
        a, b = mine["scores"][name], rival["scores"][name]
        if a["values"] is not None and b["values"] is not None:
            return verdict(a["values"], b["values"], about["better"]) if len(a["values"]) >= FEW else None
        found, other = (distances[m["name"]][name] for m in (mine, rival))
        if not found.spread or not other.spread or found.samples < FEW:
            return None
        return verdict_of_sets(found.value, other.value, found.spread.drawn, other.spread.drawn, about["better"])

    for name, about in metrics.items():
        sign = 1 if about["better"] == "higher" else -1
        for mine in (m for m in methods if m is not full and name in m["scores"]):
            rivals = [] if about["of_pairs"] else [full]
            if mine["kind"] == "ours":
                most = math.ceil(mine["computed_steps"] - WHOLE)
                able = [m for m in others if m["computed_steps"] <= most and name in m["scores"]]
                rivals += [max(able, key=lambda m: sign * m["scores"][name]["mean"])] if able else []
            for rival in (m for m in rivals if name in m["scores"]):
                said = judge(mine, rival, name, about)
                mine["scores"][name]["verdicts"] += [{"verdict": said, "against": rival["name"]}] if said else []
    return methods


def circumstances(network: nn.Module) -> JsonObject:
    """Return the time, the versions, the device and the dtype of a network, and the commit."""
    parameter = next(network.parameters())
    device = parameter.device
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{package: version_of(package) for package in ("diffcache", "torch", "diffusers", "numpy")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "commit": _commit(),
    }


def read(path: str | Path) -> JsonObject:
    """Return the record in a file. A record of version 1 is converted to the current version.

    Raises:
        DocumentError: If the file is not a record, or has another version or other fields.
    """
    where = str(path)
    found = files.read_json(Path(path))
    if found.get("format") != FORMAT:
        refuse(where, "format", f"found {found.get('format')!r:.80}", f"{FORMAT!r}, which `diffcache eval` writes")
    if type(found.get("version")) is not int or found["version"] not in (1, VERSION):
        refuse(where, "version", f"found {found.get('version')!r:.80}", f"1, {VERSION}")
    demand_fields(where, found)
    if found["version"] == 1:  # it has no field "promised"
        methods = [{"promised": None, **method} for method in found.get("methods", [])]
        found |= {"version": VERSION, "methods": methods}
    return found


def _commit() -> str:
    """Return the commit of the checkout that contains this package; "unknown" if it is not in a checkout."""
    try:
        here = Path(__file__).parent
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
