"""Find the best token schedule within a budget: plan from a profile, and decode with the plans that look best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffcache.api import accelerated
from diffcache.documents.budget import Budget
from diffcache.documents.token_profile import TokenProfile
from diffcache.documents.token_schedule import TokenExpected, TokenSchedule
from diffcache.errors import Unusable
from diffcache.planning import TokenPlan, token_plans
from diffcache.planning.token_planner import FRESH, WEIGHTS
from diffcache.profiling.measuring.token_measure import profile_of
from diffcache.profiling.recording.decode_times import time_decode
from diffcache.profiling.recording.decoding import network_of, record_decodes
from diffcache.tokens.answers import same_tokens, token_ids
from diffcache.tokens.suitability import takes_depth

TRIES = 8  # plans that are decoded with
JUDGING_SHARE = 4  # one call of so many is kept apart, for what to expect

Calls = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class DecodingCalibration:
    """Recorded decodes, from which schedules for several budgets are made.

    Attributes:
        pipe: The loop around a language model.
        profile: The measurements.
        calls: The calls that choose a plan.
        full: The result of each of these calls in the full loop.
        held_out: The calls that judge it.
        reference: The result of each of these calls in the full loop.
    """

    pipe: Any
    profile: TokenProfile
    calls: Calls
    full: Sequence[np.ndarray]
    held_out: Calls
    reference: Sequence[np.ndarray]

    @classmethod
    def record(cls, pipe: Any, calls: Calls, *, held_out: Calls | None = None, progress: bool) -> DecodingCalibration:
        """Run the calls in full.

        Args:
            pipe: A loop around a language model, or a pipeline with one.
            calls: The arguments of the loop, one dictionary for each batch.
            held_out: Calls that choose nothing and give ``expected``. None: the last quarter of ``calls``.
            progress: Whether to show a bar.

        Raises:
            Unusable: There is one call, and none is held out; or a call cannot be recorded.
        """
        if held_out is None:
            if len(calls) == 1:
                raise Unusable("calls", "there is one, and another one has to judge the plan", "Pass two calls or more")
            apart = max(1, len(calls) // JUDGING_SHARE)
            calls, held_out = calls[:-apart], calls[-apart:]
        times = time_decode(pipe, calls[0])
        with tqdm(total=len(calls), desc="record", unit="call", disable=not progress) as bar:
            decodes = record_decodes(pipe, calls, lambda: bar.update(1))
        reference = [ids_of(pipe, call) for call in held_out]
        sizes = sorted({ids.shape[1] for ids in [*(one.ids for one in decodes), *reference]})
        if len(sizes) > 1:
            raise Unusable(
                "calls", f"their answers have {' and '.join(map(str, sizes))} positions", "Pass calls of one length"
            )
        return cls(pipe, profile_of(pipe, decodes, times), calls, [one.ids for one in decodes], held_out, reference)

    def schedule(self, budget: Budget, *, tries: int = TRIES, progress: bool = False) -> TokenSchedule:
        """Plan within ``budget``, and return the plan that agrees best with the full loop.

        Args:
            budget: A goal of speed-up or of computed steps.
            tries: The most plans that are decoded with.
            progress: Whether to show a bar.

        Raises:
            Unusable: No plan meets the budget.
        """
        profile = self.profile
        plans = token_plans(profile, budget, deep=takes_depth(network_of(self.pipe)))
        with tqdm(total=tries, desc="decode", unit="plan", disable=not progress) as bar:

            def score(plan: TokenPlan) -> tuple[float, float]:
                same, _ = agreement(self.pipe, plan.schedule(profile), self.calls, self.full, profile.masks)
                bar.update(1)
                return same, -plan.seconds

            best = climbed(plans, score, tries)
        schedule = best.schedule(profile)
        same_tokens, same_answers = agreement(self.pipe, schedule, self.held_out, self.reference, profile.masks)
        expected = TokenExpected(
            answers=sum(len(one) for one in self.reference),
            same_tokens=same_tokens,
            same_answers=same_answers,
            speedup=best.speedup,
            flips=min(1.0, best.flips),
        )
        counts = f"{len(self.calls)} chose it, {len(self.held_out)} judged it"
        notes = {"made by": "optimize", "budget": str(budget), "calls": counts}
        return dataclasses.replace(schedule, expected=expected, provenance=notes)


def climbed(
    plans: Sequence[TokenPlan], score: Callable[[TokenPlan], tuple[float, float]], tries: int = TRIES
) -> TokenPlan:
    """Return the best plan that a hill climb finds, from the one with the fewest predicted flips.

    Neighbours have the next number of fresh positions, the next weight, or other refreshes.

    Args:
        plans: The plans, with the fewest predicted flips first.
        score: Decodes with a plan, and returns its score.
        tries: The most plans that are tried.
    """
    best, found = plans[0], score(plans[0])
    tried = {best}
    moving = True
    while moving:
        moving = False
        for plan in _neighbours(best, plans):
            if plan in tried or len(tried) >= tries:
                continue
            tried.add(plan)
            value = score(plan)
            if value > found:
                best, found, moving = plan, value, True
                break
    return best


def _neighbours(plan: TokenPlan, plans: Sequence[TokenPlan]) -> Iterator[TokenPlan]:
    """Yield the plans that differ from ``plan`` by one step, in the order of ``plans``."""
    for other in plans:
        fresh = abs(FRESH.index(other.fresh) - FRESH.index(plan.fresh))
        weight = abs(WEIGHTS.index(other.weight) - WEIGHTS.index(plan.weight))
        if fresh + weight == 1 or (fresh + weight == 0 and other.starts != plan.starts):
            yield other


def ids_of(pipe: Any, call: Mapping[str, Any]) -> np.ndarray:
    """Return the token ids that a call returns, int64 [B, N]."""
    with torch.no_grad():
        return token_ids(pipe(**call)).numpy()


def agreement(
    pipe: Any, schedule: TokenSchedule, calls: Calls, full: Sequence[np.ndarray], masks: float
) -> tuple[float, float]:
    """Return the share of generated tokens, and of answers, that equal those of the full loop.

    Args:
        pipe: A loop around a language model.
        schedule: The schedule.
        calls: The arguments of the loop.
        full: The results of the full loop, int64 [B, N] for each call.
        masks: The number of tokens that an answer generates.
    """
    with accelerated(pipe, schedule):
        found = [ids_of(pipe, call) for call in calls]
    same = [same_tokens(a, b) for a, b in zip(found, full, strict=True)]
    differing = sum(int((~one).sum()) for one in same)
    generated = masks * sum(len(one) for one in same)
    return 1 - differing / generated, float(np.concatenate([one.all(1) for one in same]).mean())
