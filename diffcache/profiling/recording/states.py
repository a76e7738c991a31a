"""Collect the states that a sampling loop passes through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcache import host
from diffcache.executor.store import Output
from diffcache.patch import layer
from diffcache.profiling.recording.generators import with_copied_generators


@contextlib.contextmanager
def step_states(pipe: Any, *, every: bool = False) -> Iterator[list[Tensor]]:
    """Collect copies of the states that the noise scheduler's steps return in the ``with`` block.

    Args:
        pipe: The pipeline.
        every: Whether to keep all states. If not, only the newest is kept.

    Yields:
        The list that the states are added to. It stays empty for a loop without a noise scheduler.
    """
    kept: list[Tensor] = []

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        state = _state(result)
        if state is not None:
            if not every:
                kept.clear()
            kept.append(state.detach().clone())
        return result

    off = layer(host.noise_scheduler(pipe), "step", around, copies=True)
    try:
        yield kept
    finally:
        off()


def _state(result: Any) -> Tensor | None:
    """Return the state among the values that ``scheduler.step`` returned; None if there is no tensor."""
    state = result[0] if isinstance(result, tuple) and result else getattr(result, "prev_sample", None)
    return state if isinstance(state, Tensor) else next(iter(Output.of(result).tensors), None)


def final_states(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Run each call, and return the result of its last ``scheduler.step``.

    For a loop without a noise scheduler, return the result of the call. The state of generators is unchanged.
    """
    ends = []
    for call in calls:
        with step_states(pipe) as states, torch.no_grad():
            result = pipe(**{name: with_copied_generators(value) for name, value in call.items()})
        ends.append(states[0] if states else Output.of(result).tensors[0])
    return ends
