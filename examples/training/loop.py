"""One resumable training loop for the three demo networks: time budget, warm-up + cosine, EMA, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT_EVERY_S = 120


def train(
    model: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    folder: Path,
    *,
    minutes: float,
    lr: float,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train ``model`` for ``minutes`` of wall-clock in all (earlier runs counted) and return its averaged twin.

    ``loss_of_batch`` draws a batch and returns a scalar loss. A killed run goes on from ``folder/checkpoint.pt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)

    began = saved = time.monotonic()
    running = None
    while (elapsed := spent + time.monotonic() - began) < minutes * 60:
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / (minutes * 60)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{elapsed:7.0f} s  step {step}  loss {running:.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            save(checkpoint, model, average, optimizer, step, elapsed)
            saved = time.monotonic()
    save(checkpoint, model, average, optimizer, step, elapsed)
    return average.module.eval()


def save(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int, spent: float
) -> None:
    """Write beside, then rename: a kill while writing leaves the last checkpoint whole."""
    beside = path.with_suffix(".tmp")
    states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states | {"step": step, "spent": spent}, beside)
    beside.replace(path)
