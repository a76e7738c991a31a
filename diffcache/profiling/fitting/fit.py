"""The closed-loop fit: coefficients of equation (1) that bring the accelerated run back onto the full run's states.

Walk the accelerated trajectories of all calibration samples side by side. At a computed step, run the denoiser where
the accelerated run really is. At a predicted step, choose the few weights so that the state after
``scheduler.step`` comes nearest, in least squares, to the state the full run had there. Fitting the state instead of
the output makes every prediction also repair the drift that earlier ones left behind; fitting on the accelerated
trajectory instead of the clean one leaves no bias.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.executor.equation import predict
from diffcache.executor.store import channel_dim
from diffcache.profiling.replay.replay import Position, Replay
from diffcache.simulation.simulator import ANCHORS, RIDGE

ROUNDS = 8  # where the noise scheduler clips
LEAST_SHARE = 0.05  # of a round's way; below it, there is no nearer
ROUND_PAYS = 0.01  # share of the error that a round must take away for another one to follow
CHANNEL_RIDGE = 1e-3  # one channel's branches are nearly collinear, and its samples few


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where all replays stand before a step, and what they remember: anchor steps newest first, rests by anchor."""

    positions: tuple[Position, ...]
    anchors: tuple[int, ...]
    rests: tuple[Mapping[int, Sequence[Tensor]], ...]  # per replay: anchor step -> of each branch, ``Replay.rests``

    def first(self, replays: int) -> Checkpoint:
        """Of the first so many replays."""
        return Checkpoint(self.positions[:replays], self.anchors, self.rests[:replays])


@dataclass(frozen=True, slots=True)
class Fit:
    """weights float64 [B, T, K] of the anchors' outputs, or of their rests where the replays have slopes; input
    float64 [B, T], weight of the step's own input then; scale float64 [B, T, C] or None; ``checkpoints[i]``: the run
    before step i.

    error_db  per sample, PSNR of the final state against the full run's; peak: the reference sample's own range
    held_db   the same of samples that nothing was fitted to; may be empty
    levels    float64 [T + 1], the noise levels that the loop ran over; None: its own
    """

    compute: np.ndarray
    weights: np.ndarray
    scale: np.ndarray | None
    error_db: np.ndarray
    held_db: np.ndarray
    checkpoints: Mapping[int, Checkpoint]
    levels: np.ndarray | None = None
    input: np.ndarray | None = None
    slopes: np.ndarray | None = None

    @property
    def plan(self) -> SitePlan:
        """In the terms of equation (1): Σ_k w_k (F_{a_k} − λ_{a_k} x_{a_k}) + u x has κ = u, and x_{a_0} twice."""
        inputs = None
        if self.input is not None and self.slopes is not None:
            inputs = np.zeros_like(self.weights)
            for i in np.flatnonzero(~self.compute):
                anchors = np.flatnonzero(self.compute[:i])[::-1][: inputs.shape[2]]
                inputs[:, i, : len(anchors)] = -self.weights[:, i, : len(anchors)] * self.slopes[anchors]
                inputs[:, i, 0] += self.input[:, i]
        return SitePlan(compute=self.compute, weights=self.weights, kappa=self.input, inputs=inputs, scale=self.scale)

    @property
    def score(self) -> float:
        """Mean in dB over all samples. Samples that are fitted count as well: coefficients are few, so these samples
        gain little over the others, and a mean over more samples errs less."""
        return float(np.concatenate([self.error_db, self.held_db]).mean())

    @property
    def held_score(self) -> float:
        """Mean in dB over the samples held out, if there are any."""
        return float(self.held_db.mean()) if len(self.held_db) else self.score

    def beats(self, other: Fit, by: float = 0.0) -> bool:
        """Return whether this fit, which has more coefficients or levels of its own, is better by more than ``by`` dB,
        and no worse for samples that are not fitted."""
        return self.score > other.score + by and self.held_score >= other.held_score


def fit(
    replays: Sequence[Replay],
    compute: np.ndarray,
    *,
    held: Sequence[Replay] = (),
    per_branch: bool = True,
    per_channel: bool = False,
    anchors: int = ANCHORS,
    levels: np.ndarray | None = None,
    resume: Fit | None = None,
) -> Fit:
    """Closed-loop fit of the mask ``compute`` (bool [steps of the loop]) to ``replays``.

    held         replays that walk along and are scored, without a say in the coefficients
    per_branch   separate weights for each guidance branch, else one set for all
    per_channel  a scale per channel on top of them
    anchors      most computed steps that a prediction uses
    levels       the noise levels that the replays are on, if not their own
    resume       an earlier fit of these replays whose mask and levels agree up to some step: its run is taken over up
                 to there
    """
    _demand(replays, compute)
    steps, everyone = len(compute), [*replays, *held]
    branches = replays[0].branches if per_branch else 1
    weights = np.zeros((branches, steps, anchors))
    own = np.zeros((branches, steps)) if replays[0].slopes is not None else None
    scale = np.ones((branches, steps, replays[0].channels)) if per_channel else None
    if resume is not None and (resume.weights.shape != weights.shape or (resume.scale is None) == per_channel):
        resume = None  # was made with other options
    first = _first_difference(compute, levels, resume)
    checkpoints: dict[int, Checkpoint] = {}
    if resume is not None and first > 0:
        weights[:, :first] = resume.weights[:, :first]
        if own is not None and resume.input is not None:
            own[:, :first] = resume.input[:, :first]
        if scale is not None and resume.scale is not None:
            scale[:, :first] = resume.scale[:, :first]
        checkpoints = {i: c for i, c in resume.checkpoints.items() if i <= first}
        here = checkpoints[first]
        if levels is not None or resume.levels is not None:
            positions = tuple(r.taken_over(p) for r, p in zip(everyone, here.positions, strict=True))
            here = dataclasses.replace(here, positions=positions)
    else:
        here = _start(everyone)
    for i in range(first, steps):
        checkpoints[i] = here
        if compute[i]:
            here = _computed(everyone, i, here, anchors)
            continue
        mine = here.first(len(replays))
        w, u = _solve(replays, i, mine, branches)
        weights[:, i, : len(here.anchors)] = w
        if own is not None:
            own[:, i] = u
        if scale is not None:
            scale[:, i] = _channel_scale(replays, i, mine, w, u)
        here = _predicted(everyone, i, here, w, u, None if scale is None else scale[:, i])
    errors = _errors(everyone, here)
    count = sum(r.samples for r in replays)
    slopes = replays[0].slopes
    return Fit(compute.copy(), weights, scale, errors[:count], errors[count:], checkpoints, levels, own, slopes)


def run(
    replays: Sequence[Replay],
    compute: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """PSNR in dB per sample of the final state for given weights [B, T, K], scale [B, T, C] and weight of the input
    [B, T]: nothing is fitted."""
    return _errors(replays, _end(replays, compute, weights, scale, own))


def final_states(replays: Sequence[Replay], compute: np.ndarray, weights: np.ndarray) -> list[Tensor]:
    """Where ``run`` ends: per replay, what its last ``scheduler.step`` returns."""
    return [position.state for position in _end(replays, compute, weights).positions]


def _end(
    replays: Sequence[Replay],
    compute: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> Checkpoint:
    _demand(replays, compute)
    here = _start(replays)
    for i in range(len(compute)):
        if compute[i]:
            here = _computed(replays, i, here, weights.shape[2])
        else:
            w = weights[:, i, : len(here.anchors)]
            u, s = (None if array is None else array[:, i] for array in (own, scale))
            here = _predicted(replays, i, here, w, u, s)
    return here


def _demand(replays: Sequence[Replay], compute: np.ndarray) -> None:
    steps, begins = len(replays[0].steps), replays[0].begins
    if compute.shape != (steps,) or not compute[list(begins)].all():
        strip = "".join("■" if computed else "·" for computed in compute.flat)
        musts = ", ".join(map(str, begins))
        raise BadOption("compute", strip, f"one entry for each of the loop's {steps} steps, computed at {musts}")


def _start(replays: Sequence[Replay]) -> Checkpoint:
    return Checkpoint(tuple(r.start for r in replays), (), tuple({} for _ in replays))


def _errors(replays: Sequence[Replay], end: Checkpoint) -> np.ndarray:
    last = len(replays[0].steps) - 1
    pairs = zip(end.positions, replays, strict=True)
    return np.concatenate([psnr_db(r.looked_at(p.state), r.looked_at(r.reference(last))).numpy() for p, r in pairs])


def _computed(replays: Sequence[Replay], i: int, here: Checkpoint, most: int) -> Checkpoint:
    kept = (i, *(() if i in replays[0].begins else here.anchors))[:most]  # a denoiser predicts from its own outputs
    walked: dict[int, tuple[Position, Mapping[int, Sequence[Tensor]]]] = {}
    for replay, position, history in zip(replays, here.positions, here.rests, strict=True):
        if id(replay.trajectory) not in walked:  # parts of one batch run together
            fresh = replay.compute(i, position)
            mine = replay.rests(i, fresh, replay.input(i, position))
            after = replay.move(i, position, replay.guided(i, fresh))
            walked[id(replay.trajectory)] = after, {a: mine if a == i else history[a] for a in kept}
    positions, rests = zip(*(walked[id(replay.trajectory)] for replay in replays), strict=True)
    return Checkpoint(positions, kept, rests)


def _predicted(
    replays: Sequence[Replay],
    i: int,
    here: Checkpoint,
    weights: np.ndarray,
    own: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Checkpoint:
    walked: dict[int, Position] = {}
    for n, (replay, position) in enumerate(zip(replays, here.positions, strict=True)):
        if id(replay.trajectory) not in walked:  # as in _computed
            guess = _guess(replay, i, here, n, weights, own, scale)
            like = replay.recorded(i)[0].dtype
            walked[id(replay.trajectory)] = replay.move(i, position, replay.guided(i, [g.to(like) for g in guess]))
    return Checkpoint(tuple(walked[id(replay.trajectory)] for replay in replays), here.anchors, here.rests)


def _guess(
    replay: Replay,
    i: int,
    here: Checkpoint,
    n: int,
    weights: np.ndarray,
    own: np.ndarray | None,
    scale: np.ndarray | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Branch outputs of step ``i`` of the n-th replay, by weights [B, anchors now], own [B] and scale [B, C].

    dtype  of what they are made from, and of the result; None: as it was kept
    """
    found = []
    for b in range(replay.branches):
        row = min(b, len(weights) - 1)
        kept, numbers = [here.rests[n][a][b].to(dtype) for a in here.anchors], weights[row].tolist()
        if own is not None:
            kept.append(replay.input(i, here.positions[n]).to(kept[0].dtype))
            numbers.append(float(own[row]))
        found.append(predict(kept, numbers, scale=1.0 if scale is None else per_channel_vector(scale[row], kept[0])))
    return found


def per_channel_vector(values: np.ndarray, like: Tensor) -> Tensor:
    """``values`` [C or more] for the channels of ``like``, in the shape that broadcasts against it."""
    shape = [1] * like.ndim
    dim = channel_dim(like)
    shape[dim] = like.shape[dim]
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(values[: like.shape[dim]], dtype=wide, device=like.device).view(shape)


def _solve(replays: Sequence[Replay], i: int, here: Checkpoint, branches: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights [branches, anchors now], and [branches] of the input where replays have slopes, that bring the next state
    nearest to the reference.

    Regressors are the newest output and the differences between neighbouring anchors, well scaled where the outputs
    themselves are nearly parallel. The input joins them only where outputs are taken less their share of it: beside
    whole outputs it is nearly a sum of them, and was measured to take values above 1000 for nothing.

    Where the noise scheduler clips, the next state is no affine function of the output, and a clipped element seems to
    be indifferent to it until it comes loose. There the solution is approached from plain reuse (Gauss and Newton): at
    each round the step as it is near the guess so far, and of the way to its solution as much as really brings the
    state nearer.
    """
    count, slopes = len(here.anchors), replays[0].slopes
    # One at a time where each is needed once: they are wide.
    tables = (_columns(replay, i, here, n, branches) for n, replay in enumerate(replays))
    reuse = np.tile(np.eye(count)[0], branches)
    found = reuse if slopes is None else np.append(reuse, slopes[i])
    if not any(i in replay.bent for replay in replays):
        found = _nearest(replays, i, here, tables, found)
    else:
        columns = list(tables)
        missed = _missed(replays, i, here, columns, found)
        for _ in range(ROUNDS):
            before, way = missed, _nearest(replays, i, here, columns, found, around=True) - found
            share = 1.0
            while (missed := _missed(replays, i, here, columns, found + share * way)) >= before and share > LEAST_SHARE:
                share /= 2
            if missed >= before:
                break
            found = found + share * way
            if missed > (1 - ROUND_PAYS) * before:
                break
    c = found[: branches * count].reshape(branches, count)
    # c_0 F_0 + Σ c_k (F_{k-1} - F_k)  ->  weights of the F_k themselves
    weights = np.zeros_like(c)
    weights[:, 0] = c[:, 0]
    weights[:, :-1] += c[:, 1:]
    weights[:, 1:] -= c[:, 1:]
    return weights, None if slopes is None else np.full(branches, found[-1])


def _columns(replay: Replay, i: int, here: Checkpoint, n: int, branches: int) -> Tensor:
    """The regressors of step ``i`` for the n-th replay, as they are in the guided output: float64 [regressors, …]."""
    history = here.rests[n]
    guided = {
        a: [rest.double() * g for rest, g in zip(history[a], replay.guidance[i], strict=True)] for a in here.anchors
    }
    columns = []
    for group in range(branches):
        by_anchor = [guided[a][group] if branches > 1 else torch.stack(guided[a]).sum(0) for a in here.anchors]
        columns += [by_anchor[0], *(p - q for p, q in itertools.pairwise(by_anchor))]
    if replay.slopes is not None:
        columns.append(replay.input(i, here.positions[n]).double() * sum(replay.guidance[i]))
    return torch.stack(columns) * replay.stretch(i)


def _nearest(
    replays: Sequence[Replay],
    i: int,
    here: Checkpoint,
    columns: Iterable[Tensor],
    towards: np.ndarray,
    *,
    around: bool = False,
) -> np.ndarray:
    """Coefficients of the columns by normal equations, summed over replays. ``around``: of the step as it is near what
    ``towards`` makes; else near the full run's output."""
    size = len(towards)
    gram, moment = np.zeros((size, size)), np.zeros(size)
    for replay, position, table in zip(replays, here.positions, columns, strict=True):
        at_zero, gain = replay.affine(i, position, _made(table, towards) if around else None)
        target = replay.looked_at(replay.reference(i).double() - at_zero).flatten()
        stacked = _looked_at(replay, table * gain).flatten(1)
        gram += (stacked @ stacked.T).cpu().numpy()
        moment += (stacked @ target).cpu().numpy()
    return _least_squares(gram, moment, towards=towards)


def _missed(replays: Sequence[Replay], i: int, here: Checkpoint, columns: Sequence[Tensor], found: np.ndarray) -> float:
    """By how much the next states really miss the full run's, squared and summed."""
    missed = 0.0
    for replay, position, table in zip(replays, here.positions, columns, strict=True):
        after = replay.move(i, position.widened, _made(table, found).to(torch.float32)).state
        missed += float(replay.looked_at(after.double() - replay.reference(i).double()).square().sum())
    return missed


def _looked_at(replay: Replay, table: Tensor) -> Tensor:
    """Return the samples of ``table`` [regressors, N, …] that are fitted."""
    return table if replay.rows is None else table[:, torch.as_tensor(replay.rows, device=table.device)]


def _made(table: Tensor, found: np.ndarray) -> Tensor:
    """The guided output of these coefficients, float64."""
    coefficients = torch.as_tensor(found, dtype=table.dtype, device=table.device)
    return (coefficients @ table.flatten(1)).view(table.shape[1:])


def _channel_scale(
    replays: Sequence[Replay], i: int, here: Checkpoint, weights: np.ndarray, own: np.ndarray | None
) -> np.ndarray:
    """Scales [branches, channels] of the weighed predictions that bring the next state nearest to the reference.

    Channels that the guided output lacks (learned variances) keep 1.
    """
    branches = len(weights)
    tables, moments = [], []  # per replay: [C, branches, branches], [C, branches]
    for n, (replay, position) in enumerate(zip(replays, here.positions, strict=True)):
        guess = _guess(replay, i, here, n, weights, own, dtype=torch.double)
        like = replay.guided(i, guess)
        at_zero, gain = replay.affine(i, position, like if i in replay.bent else None)
        gain = (gain * replay.stretch(i)).expand_as(like)
        target = replay.looked_at(replay.reference(i).double() - at_zero)
        gain = replay.looked_at(gain)
        parts = [replay.looked_at(g) * weight for g, weight in zip(guess, replay.guidance[i], strict=True)]
        grouped = parts if branches > 1 else [torch.stack(parts).sum(0)]
        dim = channel_dim(like)
        rows = torch.stack([(p * gain).movedim(dim, 0).flatten(1) for p in grouped], 1)  # [C, branches, elements]
        tables.append((rows @ rows.mT).cpu().numpy())
        moments.append((rows @ target.movedim(dim, 0).flatten(1)[:, :, None])[..., 0].cpu().numpy())
    scale = np.ones((branches, replays[0].channels))
    for c, (gram, moment) in enumerate(zip(np.sum(tables, axis=0), np.sum(moments, axis=0), strict=True)):
        scale[:, c] = _least_squares(gram, moment, towards=np.ones(branches), ridge=CHANNEL_RIDGE)
    return scale


def _least_squares(gram: np.ndarray, moment: np.ndarray, *, towards: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Solve the normal equations, with a ridge that draws ``towards`` a solution where they say nothing."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    normal = gram / np.outer(scale, scale) + ridge * np.eye(len(gram))
    left = moment - gram @ towards
    return np.asarray(towards + np.linalg.solve(normal, left / scale) / scale)


def _first_difference(compute: np.ndarray, levels: np.ndarray | None, resume: Fit | None) -> int:
    """The first step that is not as it was; a step ends at the level of the next one."""
    if resume is None or (levels is None) != (resume.levels is None):
        return 0
    differing = [*np.flatnonzero(compute != resume.compute)[:1], len(compute) - 1]
    if levels is not None and resume.levels is not None:
        differing += [max(int(i) - 1, 0) for i in np.flatnonzero(levels != resume.levels)[:1]]
    return int(min(differing))


def psnr_db(state: Tensor, reference: Tensor) -> Tensor:
    """float64 [N], on the CPU: PSNR of each sample in dB; the peak is the reference sample's own range."""
    a, b = state.double().flatten(1), reference.double().flatten(1)
    mse = (a - b).square().mean(1).clamp(min=1e-20)
    peak = b.amax(1) - b.amin(1)
    return (10 * torch.log10(peak**2 / mse)).cpu()
