"""Fit coefficients of equation (1) in closed loop, so that the accelerated run returns to the full run's states.

All calibration samples run through the accelerated loop together. At a computed step, the denoiser runs at the state of
the accelerated run. At a predicted step, the few weights are chosen so that the state after ``scheduler.step`` comes
nearest to the full run's state, in least squares. A fit to the state, and not to the output, also corrects the error
that earlier predictions left. A fit on the accelerated trajectory has no bias.
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
from diffcache.profiling.fitting.fidelity import psnr_db
from diffcache.profiling.replay.replay import Position, Replay
from diffcache.simulation.simulator import ANCHORS, RIDGE

ROUNDS = 8  # most rounds of a fit if the noise scheduler clips
LEAST_SHARE = 0.05  # share of the way to the new solution; a smaller one brings the final state no nearer
ROUND_PAYS = 0.01  # share of the error that a round must take away for another one to follow
CHANNEL_RIDGE = 1e-3  # the branches of one channel are nearly collinear, and its samples few


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The points that all replays have reached before a step, and the outputs that they keep.

    Attributes:
        positions: Per replay.
        anchors: The computed steps with kept outputs, newest first.
        residuals: Per replay: anchor step -> ``Replay.residuals`` of the outputs there, one tensor per branch.
    """

    positions: tuple[Position, ...]
    anchors: tuple[int, ...]
    residuals: tuple[Mapping[int, Sequence[Tensor]], ...]

    def first(self, replays: int) -> Checkpoint:
        """Return the checkpoint of the first ``replays`` replays."""
        return Checkpoint(self.positions[:replays], self.anchors, self.residuals[:replays])


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients that were fitted to recorded runs.

    Attributes:
        compute: bool [T], the mask.
        weights: float64 [B, T, K], weights of the anchors' outputs, or of their residuals if there is an input share.
        scale: float64 [B, T, C], or None.
        error_db: Per fitted sample, PSNR of the final state in dB. The peak is the reference sample's own range.
        held_db: The same of samples that were not fitted. It may be empty.
        checkpoints: Step -> the run before that step.
        levels: float64 [T + 1], the noise levels that the loop ran over. None: the recorded ones.
        input: float64 [B, T], weight of the step's own input if there is an input share, else None.
        input_share: ``Replay.input_share``.
    """

    compute: np.ndarray
    weights: np.ndarray
    scale: np.ndarray | None
    error_db: np.ndarray
    held_db: np.ndarray
    checkpoints: Mapping[int, Checkpoint]
    levels: np.ndarray | None = None
    input: np.ndarray | None = None
    input_share: np.ndarray | None = None

    @property
    def plan(self) -> SitePlan:
        """The fit as coefficients of equation (1): Σ_k w_k (F_{a_k} − λ_{a_k} x_{a_k}) + u x has κ = u.

        κ subtracts u x_{a_0}, so the weight of that input gets u in addition.
        """
        inputs = None
        if self.input is not None and self.input_share is not None:
            inputs = np.zeros_like(self.weights)
            for i in np.flatnonzero(~self.compute):
                anchors = np.flatnonzero(self.compute[:i])[::-1][: inputs.shape[2]]
                inputs[:, i, : len(anchors)] = -self.weights[:, i, : len(anchors)] * self.input_share[anchors]
                inputs[:, i, 0] += self.input[:, i]
        return SitePlan(compute=self.compute, weights=self.weights, kappa=self.input, inputs=inputs, scale=self.scale)

    @property
    def score(self) -> float:
        """Mean in dB over all samples, the fitted ones included.

        Coefficients are few, so fitted samples gain little over the others, and the mean over more samples has a
        smaller error.
        """
        return float(np.concatenate([self.error_db, self.held_db]).mean())

    @property
    def held_score(self) -> float:
        """Mean in dB over the held-out samples; ``score`` if there are none."""
        return float(self.held_db.mean()) if len(self.held_db) else self.score

    def beats(self, other: Fit, by: float = 0.0) -> bool:
        """Return whether this fit, which has more coefficients or moved levels, is better than a simpler one.

        Args:
            other: The simpler fit.
            by: Least gain of ``score`` in dB. The score of held-out samples must not be lower.
        """
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
    """Fit the coefficients of a mask to ``replays`` in closed loop.

    Args:
        replays: The runs to fit.
        compute: bool [steps of the loop], the mask.
        held: Replays that run along and are scored. No coefficient is fitted to them.
        per_branch: Fit separate weights for each guidance branch, else one set for all.
        per_channel: Fit a scale per channel in addition.
        anchors: Most computed steps that a prediction uses.
        levels: The noise levels that the replays are on, if not the recorded ones.
        resume: An earlier fit of these replays. Its run is reused up to the first step at which mask or levels differ.
    """
    _demand(replays, compute)
    steps, everyone = len(compute), [*replays, *held]
    branches = replays[0].branches if per_branch else 1
    weights = np.zeros((branches, steps, anchors))
    own = np.zeros((branches, steps)) if replays[0].input_share is not None else None
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
    input_share = replays[0].input_share
    return Fit(compute.copy(), weights, scale, errors[:count], errors[count:], checkpoints, levels, own, input_share)


def replayed_psnr_db(
    replays: Sequence[Replay],
    compute: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Run the accelerated loop with given coefficients. Nothing is fitted.

    Args:
        replays: The runs.
        compute: bool [T], the mask.
        weights: [B, T, K], weights of the anchors.
        scale: [B, T, C], or None.
        own: [B, T], weight of the step's own input, or None.

    Returns:
        float64, per sample: PSNR of the final state in dB.
    """
    return _errors(replays, _end(replays, compute, weights, scale, own))


def replayed_states(replays: Sequence[Replay], compute: np.ndarray, weights: np.ndarray) -> list[Tensor]:
    """Run the accelerated loop with given weights, and return the final state of each replay."""
    return [position.state for position in _end(replays, compute, weights).positions]


def _end(
    replays: Sequence[Replay],
    compute: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> Checkpoint:
    """Run the accelerated loop with given coefficients and return its end."""
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
    """Raise BadOption unless ``compute`` is a mask of this loop."""
    steps, first_steps = len(replays[0].steps), replays[0].first_steps
    if compute.shape != (steps,) or not compute[list(first_steps)].all():
        given = "".join("■" if computed else "·" for computed in compute.flat)
        musts = ", ".join(map(str, first_steps))
        raise BadOption("compute", given, f"one entry for each of the loop's {steps} steps, computed at {musts}")


def _start(replays: Sequence[Replay]) -> Checkpoint:
    """Return the checkpoint before the first step."""
    return Checkpoint(tuple(r.start for r in replays), (), tuple({} for _ in replays))


def _errors(replays: Sequence[Replay], end: Checkpoint) -> np.ndarray:
    """Return the PSNR of every sample's final state in dB, float64."""
    last = len(replays[0].steps) - 1
    pairs = zip(end.positions, replays, strict=True)
    return np.concatenate([psnr_db(r.looked_at(p.state), r.looked_at(r.reference(last))).numpy() for p, r in pairs])


def _computed(replays: Sequence[Replay], i: int, here: Checkpoint, most: int) -> Checkpoint:
    """Compute step ``i`` of every replay and return the next checkpoint, with at most ``most`` anchors."""
    kept = (i, *(() if i in replays[0].first_steps else here.anchors))[
        :most
    ]  # a denoiser predicts from its own outputs
    walked: dict[int, tuple[Position, Mapping[int, Sequence[Tensor]]]] = {}
    for replay, position, history in zip(replays, here.positions, here.residuals, strict=True):
        if id(replay.trajectory) not in walked:  # parts of one batch run together
            fresh = replay.compute(i, position)
            mine = replay.residuals(i, fresh, replay.input(i, position))
            after = replay.move(i, position, replay.guided(i, fresh))
            walked[id(replay.trajectory)] = after, {a: mine if a == i else history[a] for a in kept}
    positions, residuals = zip(*(walked[id(replay.trajectory)] for replay in replays), strict=True)
    return Checkpoint(positions, kept, residuals)


def _predicted(
    replays: Sequence[Replay],
    i: int,
    here: Checkpoint,
    weights: np.ndarray,
    own: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> Checkpoint:
    """Predict step ``i`` of every replay and return the next checkpoint."""
    walked: dict[int, Position] = {}
    for n, (replay, position) in enumerate(zip(replays, here.positions, strict=True)):
        if id(replay.trajectory) not in walked:  # as in _computed
            guess = _guess(replay, i, here, n, weights, own, scale)
            like = replay.recorded(i)[0].dtype
            walked[id(replay.trajectory)] = replay.move(i, position, replay.guided(i, [g.to(like) for g in guess]))
    return Checkpoint(tuple(walked[id(replay.trajectory)] for replay in replays), here.anchors, here.residuals)


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
    """Predict the branch outputs of step ``i`` of the n-th replay.

    Args:
        replay: The n-th replay.
        i: The step.
        here: The checkpoint before it.
        n: The index of the replay.
        weights: [B, anchors now].
        own: [B], weight of the step's own input, or None.
        scale: [B, C], or None.
        dtype: Number type of the kept outputs and of the result. None: as they were kept.
    """
    found = []
    for b in range(replay.branches):
        row = min(b, len(weights) - 1)
        kept, numbers = [here.residuals[n][a][b].to(dtype) for a in here.anchors], weights[row].tolist()
        if own is not None:
            kept.append(replay.input(i, here.positions[n]).to(kept[0].dtype))
            numbers.append(float(own[row]))
        found.append(predict(kept, numbers, scale=1.0 if scale is None else per_channel_vector(scale[row], kept[0])))
    return found


def per_channel_vector(values: np.ndarray, like: Tensor) -> Tensor:
    """Return ``values`` [C or more] for the channels of ``like``, in a shape that broadcasts against it."""
    shape = [1] * like.ndim
    dim = channel_dim(like)
    shape[dim] = like.shape[dim]
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(values[: like.shape[dim]], dtype=wide, device=like.device).view(shape)


def _solve(replays: Sequence[Replay], i: int, here: Checkpoint, branches: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Find the weights that bring the next state nearest to the reference.

    Regressors are the newest output and the differences between neighbouring anchors, which are well scaled where the
    outputs are nearly parallel. The step's own input is a regressor only if the replays have an input share. Together
    with whole outputs it is nearly a sum of them, and measured weights were above 1000 without a gain.

    At nonlinear steps the next state is not an affine function of the output, and a clipped element does not respond to
    it until it leaves the clip. There the solution is approached from plain reuse (Gauss and Newton). Each round
    linearises the step at the current solution, solves, and goes only as far towards the new solution as brings the
    state nearer.

    Returns:
        Weights [branches, anchors now], and weights of the input [branches] or None.
    """
    count, input_share = len(here.anchors), replays[0].input_share
    # Rows are wide, so they are read one at a time if each is needed once.
    tables = (_columns(replay, i, here, n, branches) for n, replay in enumerate(replays))
    reuse = np.tile(np.eye(count)[0], branches)
    found = reuse if input_share is None else np.append(reuse, input_share[i])
    if not any(i in replay.nonlinear_steps for replay in replays):
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
    return weights, None if input_share is None else np.full(branches, found[-1])


def _columns(replay: Replay, i: int, here: Checkpoint, n: int, branches: int) -> Tensor:
    """Return the regressors of step ``i`` for the n-th replay, as parts of the guided output, float64."""
    history = here.residuals[n]
    guided = {
        a: [rest.double() * g for rest, g in zip(history[a], replay.guidance[i], strict=True)] for a in here.anchors
    }
    columns = []
    for group in range(branches):
        by_anchor = [guided[a][group] if branches > 1 else torch.stack(guided[a]).sum(0) for a in here.anchors]
        columns += [by_anchor[0], *(p - q for p, q in itertools.pairwise(by_anchor))]
    if replay.input_share is not None:
        columns.append(replay.input(i, here.positions[n]).double() * sum(replay.guidance[i]))
    return torch.stack(columns) * replay.rescaling(i)


def _nearest(
    replays: Sequence[Replay],
    i: int,
    here: Checkpoint,
    columns: Iterable[Tensor],
    towards: np.ndarray,
    *,
    around: bool = False,
) -> np.ndarray:
    """Solve for the coefficients of the columns by normal equations, summed over replays.

    Args:
        replays: The runs to fit.
        i: The step.
        here: The checkpoint before it.
        columns: The regressors, per replay.
        towards: Coefficients that the ridge draws the solution towards.
        around: Linearise the step at the output of ``towards``, else at the full run's output.
    """
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
    """Run the step with these coefficients, and return the squared distance of the next states to the full run's."""
    missed = 0.0
    for replay, position, table in zip(replays, here.positions, columns, strict=True):
        after = replay.move(i, position.widened, _made(table, found).to(torch.float32)).state
        missed += float(replay.looked_at(after.double() - replay.reference(i).double()).square().sum())
    return missed


def _looked_at(replay: Replay, table: Tensor) -> Tensor:
    """Return the samples of ``table`` [regressors, N, …] that the fit uses."""
    return table if replay.rows is None else table[:, torch.as_tensor(replay.rows, device=table.device)]


def _made(table: Tensor, found: np.ndarray) -> Tensor:
    """Return the guided output of these coefficients, float64."""
    coefficients = torch.as_tensor(found, dtype=table.dtype, device=table.device)
    return (coefficients @ table.flatten(1)).view(table.shape[1:])


def _channel_scale(
    replays: Sequence[Replay], i: int, here: Checkpoint, weights: np.ndarray, own: np.ndarray | None
) -> np.ndarray:
    """Find the scales [branches, channels] of the predictions that bring the next state nearest to the reference.

    Channels that the guided output does not have (learned variances) keep 1.
    """
    branches = len(weights)
    tables, moments = [], []  # per replay: [C, branches, branches], [C, branches]
    for n, (replay, position) in enumerate(zip(replays, here.positions, strict=True)):
        guess = _guess(replay, i, here, n, weights, own, dtype=torch.double)
        like = replay.guided(i, guess)
        at_zero, gain = replay.affine(i, position, like if i in replay.nonlinear_steps else None)
        gain = (gain * replay.rescaling(i)).expand_as(like)
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
    """Solve the normal equations with a ridge, which draws undetermined directions ``towards`` a given solution."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    normal = gram / np.outer(scale, scale) + ridge * np.eye(len(gram))
    left = moment - gram @ towards
    return np.asarray(towards + np.linalg.solve(normal, left / scale) / scale)


def _first_difference(compute: np.ndarray, levels: np.ndarray | None, resume: Fit | None) -> int:
    """Return the first step that differs from the run of ``resume``. A step ends at the level of the next one."""
    if resume is None or (levels is None) != (resume.levels is None):
        return 0
    differing = [*np.flatnonzero(compute != resume.compute)[:1], len(compute) - 1]
    if levels is not None and resume.levels is not None:
        differing += [max(int(i) - 1, 0) for i in np.flatnonzero(levels != resume.levels)[:1]]
    return int(min(differing))
