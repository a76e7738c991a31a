"""Correct the predictions of a schedule: fit the scale and the bias of equation (1) in the accelerated run.

Per channel, this is the correction of CacheQuant (arXiv 2503.01323: "decoupled error correction") for the part of the
error that caching makes; one number for all channels is ERTACache's linear error model (arXiv 2508.21091), without the
sigmoid, which was measured to be worse than none. Both are fitted on the outputs that the store returns, at any sites.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.documents.schedule import CacheSchedule, SitePlan
from diffcache.documents.schedule_set import demand_one
from diffcache.errors import BadOption, Unusable
from diffcache.executor import Executor
from diffcache.executor.bound import Bound
from diffcache.executor.checks import check_call
from diffcache.executor.program import decides
from diffcache.executor.state import Call
from diffcache.executor.store import Output, channel_dim
from diffcache.profiling.recording.generators import with_copied_generators

ROUNDS = 2  # the first sees the run without corrections; the second, with those that the first one found
PAYS = 0.01  # a correction must take away this share of the squared error, or it is left out
FLAT = 1e-10  # below this variance, the scale of a channel cannot be estimated

Key = tuple[str, str, int, int]  # denoiser, site, branch, step


def correct(
    pipe: Any,
    schedule: CacheSchedule,
    calls: Sequence[Mapping[str, Any]],
    *,
    per_channel: bool = True,
    rounds: int = ROUNDS,
) -> CacheSchedule:
    """Return ``schedule`` with a scale and a bias per branch and step that bring predictions nearest to the truth.

    The truth is what the site would have computed there. Nearest is in least squares.

    Args:
        pipe: A pipeline, not accelerated. It is left unchanged.
        schedule: The schedule.
        calls: Arguments for ``pipe(**call)``. Each call runs ``rounds`` times, accelerated, and all sites run.
        per_channel: Fit a number for each channel of the output, else one for all.
        rounds: Number of rounds.

    Raises:
        BadOption: An argument is out of range. Also what :func:`diffcache.accelerate` raises.
    """
    demand_one("schedule", schedule)
    if not host.is_count(rounds, 1):
        raise BadOption("rounds", rounds, "a whole number, 1 or more")
    if any(map(decides, schedule.denoisers.values())):
        raise Unusable(
            "schedule",
            "a criterion chooses its predicted steps during the run",
            "Pass a schedule without a criterion",
        )
    bound = Bound.of(pipe)
    pipe = bound.pipe
    host.demand_full_run(pipe)
    host.check_calls(pipe, calls)
    for call in calls:
        check_call(schedule, call, host.iterations(pipe, call))
    layout = schedule.layout
    for _ in range(rounds):
        sums: defaultdict[Key, _Sums] = defaultdict(_Sums)

        def on_prediction(call: Call, site: str, truth: Any, sums: defaultdict[Key, _Sums] = sums) -> None:
            guessed, true = Output.of(call.uncorrected.pop(site)).tensors, Output.of(truth).tensors
            for x, y in zip(guessed, true, strict=True):
                if not x.is_floating_point():
                    continue
                rows = zip(layout.held_by(call.branch), layout.split(x), layout.split(y), strict=True)
                for branch, one, other in rows:
                    sums[call.denoiser, site, branch, call.step].add(one, other)

        executor = Executor(pipe, schedule, bound.sites, on_prediction=on_prediction)
        executor.attach()
        try:
            with torch.no_grad():
                for call in calls:
                    pipe(**{name: with_copied_generators(value) for name, value in call.items()})
        finally:
            executor.detach()
        schedule = _with(schedule, sums, layout.count, per_channel)
    return schedule.with_provenance(correction="per channel" if per_channel else "one for all channels")


class _Sums:
    """Sums over pairs of tensors, per channel, float64: x is predicted, y is true."""

    def __init__(self) -> None:
        self.count = 0
        self.moments = np.zeros(0)  # [5, C]: x, y, xx, xy, yy

    def add(self, x: Tensor, y: Tensor) -> None:
        dim = channel_dim(x)
        a, b = (t.movedim(dim, 0).flatten(1).double() for t in (x, y))
        found = torch.stack([a.sum(1), b.sum(1), (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)]).cpu().numpy()
        if self.count and found.shape != self.moments.shape:
            return  # another stream of the same site, with other channels: the first one's count
        self.moments = self.moments + found if self.count else found
        self.count += a.shape[1]

    def solve(self, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and bias per channel, or one of each."""
        mean = self.moments / self.count
        x, y, xx, xy, yy = mean if per_channel else mean.mean(axis=1, keepdims=True)
        variance, covariance = xx - x * x, xy - x * y
        tells = variance > FLAT * np.maximum(xx, 1e-300)
        scale = np.where(tells, covariance / np.where(tells, variance, 1), 1.0)
        bias = y - scale * x
        before = xx - 2 * xy + yy
        after = yy - y * y - np.where(tells, covariance * scale, 2 * covariance - variance)
        pays = before - after > PAYS * before
        return np.where(pays, scale, 1.0), np.where(pays, bias, 0.0)


def _with(schedule: CacheSchedule, sums: Mapping[Key, _Sums], branches: int, per_channel: bool) -> CacheSchedule:
    solved = {key: s.solve(per_channel) for key, s in sums.items()}
    denoisers = {}
    for name, denoiser in schedule.denoisers.items():
        plans = dict(denoiser.sites)
        for site, plan in plans.items():
            mine = dict(_of(solved, name, site))
            if mine:
                plans[site] = _corrected(plan, mine, branches, per_channel)
        denoisers[name] = dataclasses.replace(denoiser, sites=plans)
    return dataclasses.replace(schedule, denoisers=denoisers, expected=None)


def _of(solved: Mapping[Key, Any], name: str, site: str) -> Iterator[tuple[tuple[int, int], Any]]:
    return (((b, i), value) for (d, s, b, i), value in solved.items() if (d, s) == (name, site))


def _corrected(
    plan: SitePlan, found: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]], branches: int, per_channel: bool
) -> SitePlan:
    channels = max(len(scale) for scale, _ in found.values())
    scale, bias = np.ones((branches, len(plan.compute), channels)), np.zeros((branches, len(plan.compute), channels))
    for (b, i), (s, o) in found.items():
        scale[b, i], bias[b, i] = s, o
    if not per_channel:
        scale, bias = scale[..., 0], bias[..., 0]

    def apart(array: np.ndarray) -> np.ndarray:
        return array if len(array) == branches else array.repeat(branches, axis=0)

    kappa, inputs = (None if rows is None else apart(rows) for rows in (plan.kappa, plan.inputs))
    return dataclasses.replace(
        plan, weights=apart(plan.weights), kappa=kappa, inputs=inputs, scale=scale, bias=bias if bias.any() else None
    )
