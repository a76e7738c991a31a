"""What one run owns: its schedule, its anchors, what it has counted; and the forward it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffcache.executor.program import Program
from diffcache.patch import Undo
from diffcache.schedule import CacheSchedule
from diffcache.store import Store


@dataclass(slots=True)
class Counts:
    """What one site did for one branch."""

    computed: int = 0
    predicted: int = 0
    failed_open: Counter[str] = field(default_factory=Counter)


@dataclass
class State:
    """Everything one run owns; dropped with it."""

    schedule: CacheSchedule
    programs: Mapping[tuple[str, str], Program]
    store: Store = field(default_factory=Store)
    counts: dict[tuple[str, str, int], Counts] = field(default_factory=dict)
    calls_at_start: dict[str, int] = field(default_factory=dict)
    suspects: list[Tensor] = field(default_factory=list)  # finiteness flags not yet read from an accelerator
    levels_back: Undo = lambda: None

    def count(self, denoiser: str, site: str, branch: int) -> Counts:
        return self.counts.setdefault((denoiser, site, branch), Counts())

    def failures(self) -> dict[str, Counter[str]]:
        """Reason -> site -> times."""
        found: dict[str, Counter[str]] = {}
        for (denoiser, site, _), counts in self.counts.items():
            for reason, times in counts.failed_open.items():
                found.setdefault(reason, Counter())[f"{denoiser}/{site}"] += times
        return found


@dataclass(slots=True)
class Stack:
    """A stack's pass within one forward: its input, and its prediction if it is not computed.

    stand_in  what goes from block to block at a predicted step: hosts may write into it
    """

    x: tuple[Tensor, ...]
    guess: tuple[Any] | None
    stand_in: Any = None


@dataclass
class Call:
    """One forward of a denoiser: which step and branch it serves, and the stacks entered in it."""

    state: State
    denoiser: str
    step: int
    branch: int
    stacks: dict[str, Stack] = field(default_factory=dict)
