"""Train one policy on the demonstrations of one task.

    python train.py demonstrations/drawer-open-v3.npz --out runs/drawer-open --minutes 45

Writes ``policy.safetensors`` (averaged weights) every two minutes beside a checkpoint; ``--resume`` goes on from there,
``--minutes`` counts all runs together.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from model import DiffusionTransformerLowdimPolicy, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKPOINT_EVERY_S = 120
PAUSE_S = 60  # a step that seems to take longer was a process or a machine asleep; no more than this of it counts
WARM_UP_STEPS = 200


class Demonstrations:
    """Stretches of ``horizon`` steps from recorded episodes.

    A stretch may begin before its episode, so that the first step can be the newest one observed, and end after it, so
    that the last action can be the last one carried out. First and last step are repeated there.
    """

    def __init__(self, arrays: dict[str, np.ndarray], shape: Shape) -> None:
        self.observations = torch.from_numpy(arrays["observations"])
        self.actions = torch.from_numpy(arrays["actions"])
        self.n_obs_steps = shape.n_obs_steps
        self.windows = windows(arrays["ends"], shape.horizon, shape.n_obs_steps - 1, shape.n_action_steps - 1)

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, size: int) -> dict[str, Tensor]:
        """{"obs": [size, To, O], "action": [size, T, A]}, drawn with torch's generator"""
        chosen = self.windows[torch.randint(len(self.windows), (size,))]
        return {"obs": self.observations[chosen[:, : self.n_obs_steps]], "action": self.actions[chosen]}


def windows(ends: np.ndarray, horizon: int, before: int, after: int) -> Tensor:
    """Rows of every stretch, int64 [W, horizon], that reaches at most ``before`` and ``after`` steps over its episode.

    ``ends`` [E]: where episodes end (exclusive). An episode too short for any stretch gets one, from its first step on.
    """
    found = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        last = max(int(end) - horizon + after, int(begin) - before)
        starts = torch.arange(int(begin) - before, last + 1)
        found.append((starts[:, None] + torch.arange(horizon)).clamp(int(begin), int(end) - 1))
    return torch.cat(found)


def optimizer_of(policy: DiffusionTransformerLowdimPolicy, lr: float) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and learnt positions do not."""
    named = list(policy.model.named_parameters())
    decays = [x for name, x in named if x.ndim == 2]
    others = [x for name, x in named if x.ndim != 2]
    groups = [{"params": decays, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def train(
    policy: DiffusionTransformerLowdimPolicy,
    data: Demonstrations,
    folder: Path,
    *,
    minutes: float,
    batch: int = 256,
    lr: float = 1e-4,
    resume: bool = False,
    steps: int | None = None,
) -> list[float]:
    """Train for ``minutes`` in all, or ``steps`` if that is sooner. Leaves the averaged weights in ``policy``.

    Returns the loss of every step of this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise SystemExit(f"{checkpoint} is there already: go on with --resume, or remove it.")
    device = next(policy.parameters()).device
    optimizer = optimizer_of(policy, lr)
    average = EMAModel(policy.model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        step, spent = state["step"], state["spent"]

    def save() -> None:
        """Write beside, then rename: a kill while writing leaves the last checkpoint whole."""
        state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        torch.save(state | {"step": step, "spent": spent}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        average.store(policy.model.parameters())
        average.copy_to(policy.model.parameters())
        policy.save(folder / "policy.safetensors")
        average.restore(policy.model.parameters())

    size = sum(x.numel() for x in policy.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {len(data)} stretches, from step {step}", flush=True)
    policy.train()
    saved, clock = spent, time.monotonic()
    losses: list[float] = []
    while spent < minutes * 60 and (steps is None or step < steps):
        done = max(spent / (minutes * 60), step / steps if steps else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        drawn = {name: x.to(device) for name, x in data.batch(batch).items()}
        # Stretches are so short that attention written out is faster: with the fused one of CPUs, whose backward is
        # slow, a step takes half as long again.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = policy.compute_loss(drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.step(policy.model.parameters())
        step += 1
        losses.append(loss.item())
        spent, clock = spent + min(time.monotonic() - clock, PAUSE_S), time.monotonic()
        if step % 50 == 0:
            print(f"{spent:7.0f} s  step {step}  loss {np.mean(losses[-50:]):.4f}", flush=True)
        if spent - saved > CHECKPOINT_EVERY_S:
            save()
            saved = spent
    save()
    average.copy_to(policy.model.parameters())
    policy.eval()
    return losses


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("demonstrations", type=Path, help="what demonstrations.py wrote")
    args.add_argument("--out", type=Path, required=True, help="a folder")
    args.add_argument("--minutes", type=float, default=45)
    args.add_argument("--batch", type=int, default=256)
    args.add_argument("--lr", type=float, default=1e-4)
    args.add_argument("--layers", type=int, default=8)
    args.add_argument("--dropout", type=float, default=0.0)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--resume", action="store_true")
    args.add_argument("--device", default="cpu")
    o = args.parse_args()
    torch.manual_seed(o.seed)

    with np.load(o.demonstrations) as file:
        arrays = dict(file)
    obs_dim, action_dim = arrays["observations"].shape[1], arrays["actions"].shape[1]
    shape = Shape(obs_dim=obs_dim, action_dim=action_dim, layers=o.layers, dropout=o.dropout)
    data = Demonstrations(arrays, shape)
    policy = DiffusionTransformerLowdimPolicy(shape)
    policy.normalizer["obs"].fit(data.observations)
    policy.normalizer["action"].fit(data.actions)
    train(policy.to(o.device), data, o.out, minutes=o.minutes, batch=o.batch, lr=o.lr, resume=o.resume)


if __name__ == "__main__":
    main()
