"""Measure the cost of each site: operations in one more forward, seconds in a few more, by granularity."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from diffcache.documents.sites import GRANULARITIES, parse
from diffcache.patch import Wrapper
from diffcache.profiling.recording.clock import wait
from diffcache.profiling.recording.measured_sites import Places, layered
from diffcache.profiling.recording.record import DenoiserCall

REPEATS = 3  # timed forwards per granularity, after one that warms up

Meter = Callable[[], float]


def count_flops(call: DenoiserCall, places: Places) -> dict[str, int]:
    """Count the operations of one call of every site, ``model`` included, in a repeated forward."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton in: only when something is measured

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = _visits(call, places, counter.get_total_flops)
    return {site: round(statistics.median(visits)) for site, visits in found.items()}


def time_sites(call: DenoiserCall, places: Places) -> dict[str, float]:
    """Measure the median seconds of one call of every site, ``model`` included.

    A clock that waits for the device slows down the sites around it. So the model is timed alone, then blocks together
    with stacks, then sublayers.
    """
    sites = ["model", *places]
    found: dict[str, list[float]] = defaultdict(list)
    for asked in (GRANULARITIES[:1], GRANULARITIES[1:3], GRANULARITIES[3:]):
        here = {site: places.get(site, ()) for site in sites if parse(site).granularity in asked}
        for repeat in range(REPEATS + 1 if here else 0):
            with torch.no_grad():
                seen = _visits(call, {site: modules for site, modules in here.items() if modules}, _now)
            for site in here:
                found[site] += seen.get(site, []) if repeat else []
    return {site: statistics.median(seconds) for site, seconds in found.items() if seconds}


def _visits(call: DenoiserCall, places: Places, meter: Meter) -> dict[str, list[float]]:
    """Repeat a forward and return how much the meter rises in each call of each site.

    A stack's value is the sum over its blocks. There is one for each call of its last block.
    """
    found: dict[str, list[float]] = defaultdict(list)
    stacks: dict[str, float] = defaultdict(float)

    def metered(sites: list[tuple[str, bool]]) -> Wrapper:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = meter()
            value = inner(*args, **kwargs)
            risen = meter() - before
            for site, last in sites:
                if site.startswith("stack:"):
                    stacks[site] += risen
                    if last:
                        found[site].append(stacks.pop(site))
                else:
                    found[site].append(risen)
            return value

        return around

    def arounds() -> Iterator[tuple[nn.Module, Wrapper]]:
        of_module: dict[int, tuple[nn.Module, list[tuple[str, bool]]]] = {}
        for site, modules in places.items():
            for module in modules:
                of_module.setdefault(id(module), (module, []))[1].append((site, module is modules[-1]))
        for module, sites in of_module.values():
            yield module, metered(sites)

    with layered(arounds()):
        before = meter()
        call.again(call.input)
        found["model"].append(meter() - before)
    return found


def _now() -> float:
    """Return the time in seconds when the device has finished its work."""
    wait()
    return time.perf_counter()
