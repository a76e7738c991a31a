"""A small loop of our own: a real diffusers pipeline with a real noise scheduler.

Its denoiser is small enough to be odd in one way at a time, which the families of diffusers are not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerated, report
from diffcache.documents import SitePlan
from diffcache.executor import FailedOpen

STEPS = 8
MASK = "#.##.#.."


class ToyAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)
        self.calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.mix(hidden_states))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = ToyAttention(channels)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        return hidden_states + self.attn(hidden_states) * (1 + time)


class Net(nn.Module):
    """Samples [B, tokens, 3] or pictures [B, 3, H, W] in and out. ``odd``: what it does differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(3) for _ in range(3)])
        self.odd: Callable[[int, Any], Any] = lambda call, output: output
        self.between: Callable[[int, Tensor], Tensor] = lambda block, x: x
        self.left_out: tuple[int, ...] = ()
        self.seen: list[tuple[Any, Any]] = []

    def forward(self, hidden_states: Any, timestep: Tensor, prompt: Tensor) -> Any:
        x = hidden_states[0] if isinstance(hidden_states, list) else hidden_states
        pictures = x.ndim == 4
        h = x.movedim(1, -1) if pictures else x
        h = h[..., :3] + prompt
        for i, block in enumerate(self.blocks):
            if i not in self.left_out:
                h = self.between(i, block(h, timestep.to(h.dtype) / 1000))
        output = self.odd(len(self.seen), h.movedim(-1, 1) if pictures else h)
        self.seen.append((hidden_states, output))
        return (output,)


class Loop(DiffusionPipeline):
    """``guide``: how two branches reach the denoiser. ``before``: the state may be changed before each step.
    ``behind``: condition channels."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.guide = "none"
        self.before: Callable[[int, Tensor], Tensor] = lambda i, x: x
        self.behind: Callable[[Tensor], list[Tensor]] = lambda x: []
        self.given: list[tuple[Tensor, Any]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int = STEPS) -> Tensor:
        prompts = torch.tensor([0.3, -0.2], dtype=x.dtype)
        self.scheduler.set_timesteps(steps)
        self.given = []
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                x = self.before(i, x)
                if self.guide == "batched":
                    each = prompts.repeat_interleave(len(x)).view(-1, *[1] * (x.ndim - 1))
                    parts = list(self.ask(torch.cat([x, x]), t, each).chunk(2))
                else:
                    parts = [self.ask(x, t, p) for p in prompts[: 1 + (self.guide == "separate")]]
                guided = parts[0] if len(parts) == 1 else parts[1] + 2.0 * (parts[0] - parts[1])
                guided = guided[tuple(slice(n) for n in x.shape)]  # what comes back may be longer
                x = self.scheduler.step(guided.float(), t, x, return_dict=False)[0]
                bar.update()
        self.maybe_free_model_hooks()
        return x

    def ask(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        x = torch.cat([x, *self.behind(x)], dim=1 if x.ndim == 4 else -1)
        output = self.transformer(hidden_states=x, timestep=t, prompt=prompt)[0]
        self.given.append((x, output))
        return output[0] if isinstance(output, (list, tuple)) else output


def loop(guide: str = "none", odd: Callable[[int, Any], Any] | None = None) -> Loop:
    pipe = Loop(Net().requires_grad_(False), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.guide = guide
    if odd:
        pipe.transformer.odd = odd
    return pipe


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 5, 3)), generator=torch.Generator().manual_seed(1)).to(dtype)


def random_plan(mask: str, branches: int, anchors: int, *, kappa: bool = True, channels: int = 0) -> SitePlan:
    """Any coefficients that keep the loop tame. ``kappa``: those of inputs too."""
    rng = np.random.default_rng(len(mask) + branches + anchors)
    compute = np.array([c == "#" for c in mask])
    kept = np.cumsum(compute)
    weights = rng.normal(size=(branches, len(mask), anchors)) * 0.4
    weights[:, :, 0] += 0.8
    weights[:, compute] = 0
    weights[:, np.arange(anchors) >= kept[:, None]] = 0
    shape = (branches, len(mask), channels) if channels else (branches, len(mask))
    return SitePlan(
        compute=compute,
        weights=weights,
        kappa=rng.normal(size=shape[:2]) * 0.5 if kappa else None,
        inputs=(weights != 0) * rng.normal(size=weights.shape) * 0.3 if kappa else None,
        scale=rng.uniform(0.8, 1.2, size=shape),
        bias=rng.normal(size=shape) * 0.1,
    )


def assert_fails_open(
    pipe: Loop, schedule: CacheSchedule | str, says: str, failed: int, x: Tensor | None = None
) -> Tensor:
    """Run twice. Each run counts ``failed`` predictions that were computed instead, and warns once for the reason."""
    x = noise() if x is None else x
    results = []
    with accelerated(pipe, schedule):
        for _ in range(2):
            pipe.transformer.seen.clear()
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", FailedOpen)
                results.append(pipe(x))
            told = [str(warning.message) for warning in heard if "computed in full instead:" in str(warning.message)]
            assert len(told) == 1
            assert re.search(says, told[0])
            assert f"{failed} predictions were computed in full instead" in told[0]
            assert sum(sum(row.failed_open.values()) for row in report(pipe).rows) == failed
            assert says.replace("\\", "") in str(report(pipe))
            assert report(pipe).bytes_held == 0
        assert failed in report(pipe).reasons.values()
        assert 2 * failed in report(pipe).totals.values()
    one, other = results
    assert torch.equal(one, other)
    return one
