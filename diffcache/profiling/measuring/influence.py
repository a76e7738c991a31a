"""Measure how an error of one site's output changes the denoiser's output.

Forwards of a recorded run are repeated with one site's output taken from the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.executor.store import Output
from diffcache.patch import Wrapper
from diffcache.profiling.recording.measured_sites import Places, layered
from diffcache.profiling.recording.record import DenoiserCall

MOST_RUNS = 4  # the work that all of it may take, in full runs


def steps_to_measure(steps: int, forwards: int, sites: int, most: int) -> list[int]:
    """Choose the steps at which influence is measured, evenly spread from step 1 on.

    Args:
        steps: Number of steps of the loop.
        forwards: Number of forwards of the full run.
        sites: Number of sites to measure. At each step, every site takes one forward, and all together take two more.
        most: Most steps to choose.

    Returns:
        At least one step, and as many as cost no more than MOST_RUNS full runs.
    """
    affordable = MOST_RUNS * forwards // (sites + 2)
    count = min(max(affordable, 1), most, steps - 1)
    return [round(1 + (steps - 1) * (2 * n + 1) / (2 * count) - 0.5) for n in range(count)]


def measure_influence(
    calls: Sequence[DenoiserCall], places: Places, main: Mapping[str, int], at: Sequence[int]
) -> dict[str, np.ndarray]:
    """Measure the influence of every site.

    A site's output is replaced by its full output one step before, which is kept in main memory for one step at a time.

    Args:
        calls: The same forward of each step of a recorded run.
        places: Site -> its modules.
        main: Site -> the index of the tensor in its output that is compared. All tensors are replaced.
        at: The steps, from 1 on, at which influence is measured. It is interpolated between them and constant beyond.

    Returns:
        Site -> float64 [T]: the mean square change of the denoiser's output, per mean square change of the site's.
    """
    ratios: dict[str, list[float]] = {site: [] for site in places}
    with torch.no_grad():
        for i in at:
            before = _outputs(calls[i - 1], places)
            moved = _moves(calls[i], places, main, before)
            for site, modules in places.items():
                if site not in before or not moved.get(site):
                    ratios[site].append(0.0)  # an unchanged output has no influence, and must not be a divisor
                    continue
                with layered([(modules[-1], _handing_on(before[site], calls[i].output.device))]):
                    outputs = calls[i].again(calls[i].input)
                ratios[site].append(_mean_square(outputs, calls[i].outputs) / moved[site])
    steps = np.arange(len(calls))
    return {site: np.asarray(np.interp(steps, at, found)) for site, found in ratios.items()}


def _outputs(call: DenoiserCall, places: Places) -> dict[str, Output]:
    """Repeat a forward and return the output of every site."""
    found: dict[str, Output] = {}

    def keep(site: str, output: Output) -> None:
        tensors = tuple(t.detach().to("cpu", copy=True) for t in output.tensors)
        found.setdefault(site, Output(tensors, output.others, output.spec))

    with layered(_seen(places, keep)):
        call.again(call.input)
    return found


def _moves(
    call: DenoiserCall, places: Places, main: Mapping[str, int], before: Mapping[str, Output]
) -> dict[str, float]:
    """Repeat a forward and return the mean square difference of each site's output from ``before``."""
    found: dict[str, float] = {}

    def compare(site: str, output: Output) -> None:
        j = main.get(site, 0)
        then = before[site].tensors if site in before else ()
        if j < min(len(then), len(output.tensors)) and then[j].shape == output.tensors[j].shape:
            found.setdefault(site, _mean_square([output.tensors[j]], [then[j].to(output.tensors[j].device)]))

    with layered(_seen(places, compare)):
        call.again(call.input)
    return found


def _seen(places: Places, look: Callable[[str, Output], None]) -> Iterator[tuple[nn.Module, Wrapper]]:
    """Return layers that call ``look`` with the output of each site."""

    def around(site: str) -> Wrapper:
        def watch(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            look(site, Output.of(value))
            return value

        return watch

    return ((modules[-1], around(site)) for site, modules in places.items())


def _handing_on(output: Output, device: torch.device) -> Wrapper:
    """Return a layer that returns ``output`` and does not run the module."""

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return output.rebuild([t.to(device, copy=True) for t in output.tensors])

    return around


def _mean_square(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the mean square of the differences, over all elements of all tensors."""
    squares = sum(float((s.double() - t.double()).square().sum()) for s, t in zip(a, b, strict=True))
    return squares / sum(t.numel() for t in b)
