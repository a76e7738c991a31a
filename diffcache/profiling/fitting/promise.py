"""Split samples into those that fit, accept and judge a schedule, and compute the fidelity to expect of it.

A fidelity from samples that took part in a choice is too high, because the choice favours what happens to suit them. So
the samples are split in three. The coefficients are fitted to the first part. Candidates are accepted by the first and
the second part. The third part is used for the expected fidelity alone.

The third part is small, and samples differ far more from each other than plans do on one sample. Its mean alone would
describe these samples more than the plan. So a reference plan that was not chosen, the evenly spread mask, is fitted as
well, once to each half of all samples and scored on the other half. The expected fidelity is the mean of the plan over
the third part, corrected by how much easier or harder this part is than all samples for the reference (a regression
estimator: Cochran, "Sampling Techniques", chapter 7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffcache.documents.schedule import Expected
from diffcache.profiling.fitting.fit import Fit
from diffcache.profiling.replay.replay import Replay

JUDGING_SHARE = 4  # one sample in this many judges, and one in this many accepts
LEAST_FOR_SLOPE = 6  # samples from which the regression's slope is fitted; below, it is 1


@dataclass(frozen=True, slots=True)
class Shares:
    """The samples of all replays, split. Parts of one recorded batch are replays of the same trajectory.

    Attributes:
        fitting: Samples that coefficients are fitted to.
        accepting: Further samples that candidates are accepted by. It may be empty.
        judging: Samples that neither fit nor accept. It is empty if there is only one sample.
    """

    fitting: list[Replay]
    accepting: list[Replay]
    judging: list[Replay]

    @classmethod
    def of(cls, replays: Sequence[Replay], held: Sequence[Replay] = ()) -> Shares:
        """Split ``replays``. If the user holds out some (``held``), these accept and judge, and all others fit."""
        if held:
            count = _count(held)
            return cls(list(replays), *_cut(held, [count // 2, count - count // 2]))
        count = _count(replays)
        judging = max(1, count // JUDGING_SHARE) if count > 1 else 0
        accepting = max(1, count // JUDGING_SHARE) if count > 2 else 0
        return cls(*_cut(replays, [count - accepting - judging, accepting, judging]))

    def apply(self, change: Callable[[Sequence[Replay]], list[Replay]]) -> Shares:
        """Return the same split of changed replays.

        Args:
            change: Called with all replays at once, so that it can keep parts of one batch together.
        """
        changed = iter(change([*self.fitting, *self.accepting, *self.judging]))
        parts = [[next(changed) for _ in part] for part in (self.fitting, self.accepting, self.judging)]
        return Shares(*parts)

    @property
    def everyone(self) -> list[Replay]:
        """All samples, in the order of the runs. Parts of one batch are joined again."""
        rows: dict[int, list[np.ndarray]] = {}
        first: dict[int, Replay] = {}
        for replay in (*self.fitting, *self.accepting, *self.judging):
            key = id(replay.trajectory)
            first.setdefault(key, replay)
            rows.setdefault(key, []).append(np.arange(replay.batch) if replay.rows is None else replay.rows)
        return [replay.part(np.sort(np.concatenate(rows[key]))) for key, replay in first.items()]


def leading(replays: Sequence[Replay], samples: int) -> list[Replay]:
    """Return the first replays that together hold ``samples`` samples, or all."""
    held = np.cumsum([r.samples for r in replays])
    return list(replays[: int(np.searchsorted(held, samples)) + 1])


def promised(shares: Shares, plan: Fit, even: Callable[[Sequence[Replay], Sequence[Replay]], Fit]) -> Expected:
    """Return the fidelity to expect of a plan on fresh samples.

    Args:
        shares: The samples.
        plan: The fit of the plan, scored on all of them in the order of ``shares``; no judging sample is fitted.
        even: (fitted, held) -> the fit of the reference, the evenly spread mask.
    """
    if not shares.judging:
        return Expected.over(plan.error_db, "calibration")
    others = [*shares.accepting, *shares.judging]
    first, second = even(shares.fitting, others), even(others, shares.fitting)
    reference = np.concatenate([second.held_db, first.held_db])
    found = np.concatenate([plan.error_db, plan.held_db])
    judging = np.arange(len(found)) >= len(found) - _count(shares.judging)
    shift = reference.mean() - reference[judging].mean()
    mean = found[judging].mean() + _slope(reference[~judging], found[~judging]) * shift
    expected = Expected.over(found - found.mean() + mean, "held-out")  # the spread is that of all samples
    return dataclasses.replace(expected, samples=int(judging.sum()))


def _slope(reference: np.ndarray, own: np.ndarray) -> float:
    """Return how much the plan's fidelity changes per dB of the reference's from sample to sample, within 0 to 1.5."""
    spread = reference.var()
    if len(own) < LEAST_FOR_SLOPE or spread < 1e-9:
        return 1.0
    return float(np.clip(np.mean((reference - reference.mean()) * (own - own.mean())) / spread, 0.0, 1.5))


def _count(replays: Sequence[Replay]) -> int:
    """Return the number of samples."""
    return sum(replay.samples for replay in replays)


def _cut(replays: Sequence[Replay], counts: Sequence[int]) -> list[list[Replay]]:
    """Cut the samples of ``replays``, in their order, into groups of ``counts`` samples."""
    groups: list[list[Replay]] = [[] for _ in counts]
    ends = np.cumsum(counts)
    place = 0
    for replay in replays:
        places = place + np.arange(replay.samples)
        for group, begin, end in zip(groups, ends - counts, ends, strict=True):
            rows = np.flatnonzero((places >= begin) & (places < end))
            if len(rows):
                group.append(replay.part(rows))
        place += replay.samples
    return groups
