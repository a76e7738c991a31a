"""Describe a kind of host for evaluation and recording: results, arguments and side effects of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """Facts that hold for every host of a kind.

    Attributes:
        returns: The result of a call: decoded pictures, video or audio ("pictures"), the final state of the loop
            ("state"), actions ("actions"), or token ids ("tokens").
        metrics: The metrics that an evaluation uses unless the user names others.
        plays_episodes: Whether the host acts in a task, so that an evaluation can count successful episodes.
        steps_argument: The argument of a call that states the number of steps. None: a call has none, and the loop has
            to run to show its number of steps.
        has_step_setting: Whether the number of steps is also a setting of the host, which ``host.of_steps(steps)``
            changes within a ``with`` block. Tasks that call the host get that number too.
        swaps_scheduler: Whether the loop can step another noise scheduler than the one it was built with.
        writes_arguments: Whether the loop may write into the tensors that it has passed to the denoiser, so that a
            recording has to copy them.
    """

    returns: Literal["pictures", "state", "actions", "tokens"]
    metrics: tuple[str, ...]
    plays_episodes: bool = False
    steps_argument: str | None = None
    has_step_setting: bool = False
    swaps_scheduler: bool = False
    writes_arguments: bool = False
