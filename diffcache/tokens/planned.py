"""Turn a token schedule into a rule: the positions that have drifted most, and refreshes at planned commits."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import nn

from diffcache import host
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import ScheduleMismatch
from diffcache.simulation import drifted, stalest
from diffcache.tokens.spec import TokenRule
from diffcache.tokens.view import Fresh, View


def rule_of(schedule: TokenSchedule) -> TokenRule:
    """Return the rule that follows a schedule."""
    return TokenRule(repr(schedule), partial(fresh, schedule=schedule), needs=schedule.needs)


def demand_network(schedule: TokenSchedule, network: nn.Module, *, strict: bool) -> None:
    """Raise ScheduleMismatch if a schedule was made for another network.

    Args:
        schedule: The schedule.
        network: The language model.
        strict: Whether to compare the configurations as well.
    """
    from diffcache.tokens.layers import decoder_layers

    found, layers = host.class_name(network), len(decoder_layers(network))
    if (found, layers) != (schedule.class_name, schedule.layers):
        raise ScheduleMismatch(
            f"the schedule was made for {schedule.class_name} with {schedule.layers} layers, and this model is "
            f"{found} with {layers}. Make one for this model: diffcache.optimize(loop, calls, budget)."
        )
    if strict and schedule.config_digest not in (None, host.config_digest(network)):
        raise ScheduleMismatch(
            f"the schedule was made for a {found} with parameters of other names or shapes. Make one for this model: "
            "diffcache.optimize(loop, calls, budget); strict=False accepts it as it is."
        )


def fresh(view: View, *, schedule: TokenSchedule) -> Fresh:
    """Return the positions that have changed, and those that have drifted most; at a refresh, all.

    Args:
        view: The state of the canvas. Its memory holds the drift and the part of the decode that each row is in.
        schedule: The schedule.
    """
    rows, size = view.masked.shape
    drift = view.memory.get("drift", np.zeros((rows, 0)))
    drift = np.pad(drift, ((0, 0), (0, size - drift.shape[1])))
    drift = drifted(drift, view.changed & ~view.masked, view.masked, schedule.drift)
    positions = view.changed | stalest(drift, view.masked, schedule.drift, schedule.fresh, schedule.weight)
    part, start = _refresh(view, schedule)
    positions[start == 0] = True
    drift[positions | (start < schedule.layers)[:, None]] = 0
    view.memory.update(drift=drift, part=part)
    return Fresh(positions, start=start if schedule.needs else None)


def _refresh(view: View, schedule: TokenSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of the decode that each row is in, int64 [B], and the first layer to compute in full there.

    A row that has passed several parts since the last forward takes the deepest of their refreshes.
    """
    masks = np.maximum((~view.prompt).sum(1), 1)
    done = (~view.prompt & ~view.masked).sum(1)
    part = np.minimum(done * len(schedule.starts) // masks, len(schedule.starts) - 1)
    before = view.memory.get("part", np.zeros_like(part))
    start = np.full(len(part), schedule.layers)
    for row in np.flatnonzero((part > before) & view.masked.any(1)):
        start[row] = int(schedule.starts[before[row] + 1 : part[row] + 1].min())
    return np.maximum(part, before), start
