"""What both scripts of this folder need: a device, a clock that tells the truth about it, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcache.demo.run import machine
from diffcache.documents import files
from diffcache.profiling.recording import wait

RESULTS = Path(__file__).resolve().parents[1] / "results"


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def results(stem: str, device: torch.device) -> Path:
    """Where results go unless told otherwise: one file a kind of device."""
    return RESULTS / f"{stem}-{re.sub('[^a-z0-9]+', '-', title(device).lower())}.md"


def circumstances(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    found = {"device": title(device), **machine()}
    for package in ("triton", "cache-dit"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | ({"runtime": torch.version.cuda or torch.version.hip} if device.type == "cuda" else {})


def write(out: Path, markdown: str, record: dict[str, Any]) -> None:
    """The table, and JSON beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, markdown.rstrip("\n") + "\n")
    files.write(out.with_suffix(".json"), json.dumps(record, indent=2) + "\n")


def in_words(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items())


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians in milliseconds: of the work, and of the time until the host has handed it over."""

    ms: float
    host_ms: float


class Clock:
    """Times work whose inputs are not in a cache: between two runs something larger than caches is written.

    On a GPU that writing also takes longer than the host needs to hand over a few kernels, so that events see the
    device's own time.
    """

    def __init__(self, device: torch.device, repeats: int, flush_bytes: int, warm_up: int = 2) -> None:
        self._device, self._repeats, self._warm_up = device, repeats, warm_up
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], Any]) -> Timing:
        for _ in range(self._warm_up):
            work()
        once = self._on_gpu if self._device.type == "cuda" else self._on_cpu
        pairs = [once(work) for _ in range(self._repeats)]
        ms, host_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        return Timing(ms, host_ms)

    def _on_gpu(self, work: Callable[[], Any]) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait()
        self._flush.zero_()
        begin.record()
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), 1e3 * host

    def _on_cpu(self, work: Callable[[], Any]) -> tuple[float, float]:
        self._flush.zero_()
        began = time.perf_counter()
        work()
        ms = 1e3 * (time.perf_counter() - began)
        return ms, ms


class Copies:
    """The ceiling: how fast ``copy_`` moves bytes from a tensor of this device to another."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self._known: dict[int, float] = {}

    def gb_s(self, moved: int) -> float:
        """Bytes read and bytes written count, as they do for the operations; half of ``moved`` are each."""
        half = moved // 2
        if half not in self._known:
            source = torch.ones(half, dtype=torch.uint8, device=self._device)
            target = torch.empty_like(source)
            self._known[half] = 2e-6 * half / self._clock(lambda: target.copy_(source)).ms
        return self._known[half]


class Budget:
    """Minutes since the script began, of those it may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes

    def allows(self, seconds: float = 0.0) -> bool:
        return time.perf_counter() + seconds < self._end
