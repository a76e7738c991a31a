"""What do the layers cost? Time spent in them, of a transformer of ordinary width, step by step.

    python benchmarks/layer_overhead.py

A DiT of 12 blocks, 1024 wide, sees 1024 tokens, in bfloat16. Per forward, the clock is read before and after each
layered module and before and after what it wraps, so that the layers' own time is known to microseconds whatever the
network's varies by; the same readings without layers are taken off. Beside it stands the network's own time, untouched.
Prints the table and writes ``results/layer-overhead.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from torch import nn

from diffcache import CacheSchedule, accelerated
from diffcache.demo.run import machine
from diffcache.documents import DenoiserPlan, SitePlan, files
from diffcache.host import find_sites
from diffcache.patch import layer

RESULTS = Path(__file__).parent / "results"
BLOCKS, WIDTH, TOKENS, PATCH = 12, 1024, 1024, 2
SIDE = int(TOKENS**0.5) * PATCH
WARM = 3  # first forwards of a run that are not counted
SCHEDULES = {
    **{f"all computed, {kind} sites": (kind, f"full:sites={kind}") for kind in ("model", "stack", "block", "sublayer")},
    "predicted, reuse": ("model", "uniform:every=100"),
    "predicted, three anchors": ("model", "three anchors"),
}


class Loop(DiffusionPipeline):  # type: ignore[misc]
    """Nothing but a denoiser and a noise scheduler."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        dtype = next(self.transformer.parameters()).dtype
        x = torch.randn((1, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(dtype)
        with self.progress_bar(total=steps):
            for t in self.scheduler.timesteps:
                out = self.transformer(x, timestep=t[None], class_labels=torch.tensor([1])).sample
                x = self.scheduler.step(out, t, x).prev_sample
        self.maybe_free_model_hooks()


@contextmanager
def clocks(modules: list[nn.Module]) -> Iterator[list[tuple[float, float]]]:
    """Per forward of the first module: (seconds in it, seconds of those outside what the modules' layers wrap)."""
    found: list[tuple[float, float]] = []
    within: list[float] = []  # of the modules entered and not left: seconds spent in what their layers wrap
    outside = [0.0]

    def wrapped(inner: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            within[-1] += time.perf_counter() - begin

    begins: list[float] = []

    def enter(module: nn.Module, args: Any) -> None:
        within.append(0.0)
        begins.append(time.perf_counter())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        seconds = time.perf_counter() - begins.pop()
        outside[0] += seconds - within.pop()
        if module is modules[0]:
            found.append((seconds, outside[0]))
            outside[0] = 0.0

    with ExitStack() as undo:
        for module in modules:
            undo.callback(layer(module, "forward", wrapped))  # below what comes later
            undo.callback(module.register_forward_pre_hook(enter).remove)
            undo.callback(module.register_forward_hook(leave).remove)
        yield found


def three_anchors(steps: int) -> CacheSchedule:
    """The parabola through the outputs of the first three steps, at all others."""
    compute = np.arange(steps) < 3
    weights = np.where(compute[None, :, None], 0.0, np.array([3.0, -3.0, 1.0]))
    plan = SitePlan(compute=compute, weights=weights)
    return CacheSchedule(steps=steps, denoisers={"transformer": DenoiserPlan(sites={"model": plan})})


def forwards(pipe: Loop, kind: str, spec: str, steps: int) -> list[tuple[float, float]]:
    """The forwards of one run, the sites of this kind watched; ``spec`` "" is the untouched pipeline."""
    sites = find_sites(pipe.transformer)
    inner = [m for site, parts in sites.items() if kind != "model" and site.startswith(f"{kind}:") for m in parts]
    schedule = three_anchors(steps) if spec == "three anchors" else spec
    with clocks([pipe.transformer, *inner]) as found, accelerated(pipe, schedule) if spec else nullcontext():
        pipe(steps)
    return found[WARM:]


def medians(found: list[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*found, strict=True))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--steps", type=int, default=12)
    o = args.parse_args()
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=WIDTH // 16, num_layers=BLOCKS, sample_size=SIDE, in_channels=4
    )
    pipe = Loop(network.eval().to(torch.bfloat16), DDIMScheduler())
    lines = ["| | a forward | of it in the layers | share of a computed forward |", "|---|---:|---:|---:|"]
    records = []
    for name, (kind, spec) in SCHEDULES.items():
        plain, found = (forwards(pipe, kind, which, o.steps) for which in ("", spec))
        (full, readings), (whole, layers) = (medians(part) for part in (plain, found))
        own = max(layers - readings, 0.0)
        records.append({"schedule": name, "untouched": plain, "layered": found})
        lines.append(f"| {name} | {1e3 * whole:.3f} ms | {1e3 * own:.3f} ms | {own / full:.3%} |")
        print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    files.write(RESULTS / "layer-overhead.md", "\n".join(lines) + "\n")
    files.write(
        RESULTS / "layer-overhead.json", json.dumps({"circumstances": machine(), "rows": records}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
