"""Criteria of a package outside of the library, and schedules of the small loop that a criterion decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from online import HUGE, residual
from small_loop import STEPS
from torch import Tensor

from diffcache import CacheSchedule
from diffcache.documents import DenoiserPlan, Online

PLANTED = '''
"""Criteria of a package that is not part of the library."""

import numpy as np

from diffcache.errors import BadOption
from diffcache.executor.criteria import About, Where
from diffcache.documents.schedule import Online
from diffcache.schedulers._greedy import asked


class Largest:
    """Compare the largest change of an element of the input with the largest element before."""

    ABOUT = About(source="a test", where=Where.MODEL, parameters=("most",))

    def change(signal, memory):
        (now,), (then,) = signal.now, signal.then
        return (now - then).abs().max() / then.abs().max()

    def check(online):
        if online.limit.max() == 77:
            raise BadOption("limit", 77, "another number")


class Scaled:
    """``Largest`` times a factor: an instance holds a parameter that schedules have no field for."""

    ABOUT = Largest.ABOUT

    def __init__(self, factor):
        self.factor = factor

    def change(self, signal, memory):
        return self.factor * Largest.change(signal, memory)


TWICE = Scaled(2.0)


class Half:
    """Add up the changes of the first half of the channels that the first normalisation returns."""

    ABOUT = About(source="a test", where=Where.FIRST_NORM, accumulates=True)

    def signal(tensors):
        return [t[..., : t.shape[-1] // 2] for t in tensors]

    def change(signal, memory):
        return signal.moved / signal.level


class Observed:
    """Compare the first block's residual, once a computed step has been observed, and keep its output."""

    ABOUT = About(source="a test", where=Where.FIRST_BLOCK)

    def ready(memory):
        return "seen" in memory.numbers

    def change(signal, memory):
        return signal.moved / signal.level

    def observe(memory, x, output):
        memory.numbers["seen"] = output[0].mean()
        memory.keep("output", output)

    def keeps(x, output):
        return output


class Average:
    """Compare the input with its moving average: the options are those of this criterion alone."""

    ABOUT = About(source="a test", where=Where.MODEL)

    def change(signal, memory, *, gamma: float = 0.5, norm: str = "l1", power: int = 1):
        average = memory.numbers.get("average", 0) * gamma + signal.moved / signal.level * (1 - gamma)
        memory.numbers["average"] = average
        return average**power if norm == "l1" else average * 0

    def observe(memory, x, output, *, gamma: float = 0.5):
        memory.numbers["gamma"] = output[0].new_tensor(gamma)

    def check(online):
        if not 0 <= online.options["gamma"] < 1:
            raise BadOption("gamma", online.options["gamma"], "0 or more, below 1")


class Optionless:
    """Its option has no default that a file can hold."""

    ABOUT = Average.ABOUT

    def change(signal, memory, *, gamma):
        return signal.moved


class Torn:
    """Two functions give one option different defaults."""

    ABOUT = Average.ABOUT

    def change(signal, memory, *, gamma: float = 0.5):
        return signal.moved

    def ready(memory, *, gamma: float = 0.25):
        return True


class Chosen:
    """A rule that leaves its decisions to a criterion of the same package."""

    def rule(grid, *, limit=0.5):
        return asked(grid.steps, 1), Online(rule="planted_of_tests:Largest", limit=np.full(grid.steps, float(limit)))


class Nothing:
    ABOUT = "about"
'''


def toy(rule: str, limit: float = HUGE, plan: Any = None, **options: Any) -> CacheSchedule:
    """A schedule of the small loop's ``model`` site."""
    plan = plan or residual("#" + "." * (STEPS - 1))
    online = Online(rule=rule, limit=np.full(STEPS, limit), options=options)
    denoiser = DenoiserPlan(sites={"model": plan}, online=online)
    return CacheSchedule(steps=STEPS, denoisers={"transformer": denoiser})


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed)).to(dtype),)
