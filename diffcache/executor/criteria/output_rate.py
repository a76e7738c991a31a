"""Add up the changes of the input, times the rate at which the output responds to such changes (EasyCache).

The rate is measured between the two newest computed steps. It is the relative change of the output per change of the
input.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffcache.executor.criteria import About, Memory, Signal, Where, distance, size

ABOUT = About(source="EasyCache, arXiv 2507.02860, H-EmbodVis/EasyCache @5127804", where=Where.MODEL, accumulates=True)

ANSWER, RATE = "answer", "rate"


def ready(memory: Memory) -> bool:
    """Return whether two computed steps have been compared."""
    return RATE in memory.numbers


def change(signal: Signal, memory: Memory) -> Tensor:
    """Return the relative L1 change of the output, estimated from the change of the input, 0-d."""
    return signal.moved * memory.numbers[RATE]


def observe(memory: Memory, x: Sequence[Tensor], output: Sequence[Tensor]) -> None:
    """Measure the rate between this computed step and the one before, and keep this step's input and output."""
    now = keeps(x, output)
    then = memory.kept(ANSWER, like=now)
    memory.numbers.pop(RATE, None)
    if then is not None:
        n = len(x)
        memory.numbers[RATE] = distance(now[n:], then[n:]) / distance(now[:n], then[:n]) / size(now[n:])
    memory.keep(ANSWER, now)


def keeps(x: Sequence[Tensor], output: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the denoiser's input and its floating-point outputs."""
    return (*x, *(t for t in output if t.is_floating_point()))
