"""How often a policy succeeds, and how fast it answers.

    python rollouts.py runs/drawer-open/policy.safetensors --task drawer-open-v3 --episodes 100
    python rollouts.py runs/drawer-open/policy.safetensors --task drawer-open-v3 --sampler ddim --steps 10

Episodes are seeded, and so is the noise of every call, so two policies or two samplers meet the same placements with
the same noise. ``rollout`` asks nothing of a policy but ``predict_action``, ``n_obs_steps`` and ``n_action_steps``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demonstrations
import numpy as np
import torch
from model import SAMPLERS, DiffusionTransformerLowdimPolicy, use_sampler
from torch import Tensor

MAX_STEPS = 200


@dataclass(frozen=True)
class Rollouts:
    """``success`` bool [N]; ``steps`` int [N] until success or the limit; ``calls``: batch size and seconds of each
    ``predict_action``; ``alone_s``: seconds of one with a batch of one; ``control_rate``: actions per second then."""

    success: np.ndarray
    steps: np.ndarray
    calls: list[tuple[int, float]]
    alone_s: float
    control_rate: float

    @property
    def seconds_per_call(self) -> float:
        """Mean over the calls, of whatever batch size."""
        return sum(seconds for _, seconds in self.calls) / len(self.calls)


class Episode:
    """One environment on its way, and what the policy has seen of it."""

    def __init__(self, env: Any, placement: Any, index: int, n_obs_steps: int) -> None:
        self.env, self.index = env, index
        env.set_task(placement)
        first, _ = env.reset()
        self.seen = deque([first] * n_obs_steps, maxlen=n_obs_steps)
        self.calls = self.steps = 0
        self.success = False

    def observed(self) -> Tensor:
        """float32 [To, O]"""
        return torch.from_numpy(np.stack(self.seen).astype(np.float32))

    def act(self, actions: np.ndarray, max_steps: int) -> bool:
        """Carry out ``actions`` [n, A] until success or the limit; whether the episode is over."""
        self.calls += 1
        for action in actions:
            observation, _, _, _, info = self.env.step(np.clip(action, -1, 1))
            self.seen.append(observation)
            self.steps += 1
            self.success = self.success or bool(info["success"])
            if self.success or self.steps == max_steps:
                return True
        return False


@functools.cache
def environments(task: str) -> list[Any]:
    """Those built so far: each takes a second, and serves any number of episodes, one after the other."""
    return []


def noise_of(seed: int, episode: int, call: int) -> torch.Generator:
    """The same noise for a call of an episode, whoever else is in the batch and however much noise a sampler draws."""
    state = np.random.SeedSequence([seed, episode, call]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def rollout(
    policy: Any,
    task: str,
    episodes: int,
    seed: int = demonstrations.EVALUATION_SEED,
    *,
    at_once: int = 25,
    max_steps: int = MAX_STEPS,
    timed_alone: int = 3,
    device: str = "cpu",
) -> Rollouts:
    """Let ``policy`` play ``episodes`` episodes of ``task``, ``at_once`` of them side by side.

    The policy is called once for all that are under way, and its ``n_action_steps`` are carried out before it is asked
    again. An episode that is over makes room for the next one. ``seed`` fixes placements and noise.
    """
    waiting = enumerate(itertools.islice(demonstrations.placements(task, seed), episodes))
    built = environments(task)
    built += [demonstrations.environment(task) for _ in range(min(at_once, episodes) - len(built))]
    idle = built[: min(at_once, episodes)]
    running: list[Episode] = []
    success, steps, calls = np.zeros(episodes, bool), np.zeros(episodes, int), []

    def ask(those: list[Episode]) -> tuple[np.ndarray, float]:
        observed = torch.stack([one.observed() for one in those]).to(device)
        generators = [noise_of(seed, one.index, one.calls) for one in those]
        began = time.perf_counter()
        action = policy.predict_action({"obs": observed}, generator=generators)["action"].cpu().numpy()
        return action, time.perf_counter() - began

    while True:
        while idle and (following := next(waiting, None)):
            running.append(Episode(idle.pop(), following[1], following[0], policy.n_obs_steps))
        if not running:
            break
        action, seconds = ask(running)
        calls.append((len(running), seconds))
        still = []
        for one, actions in zip(running, action, strict=True):
            if one.act(actions, max_steps):
                success[one.index], steps[one.index] = one.success, one.steps
                idle.append(one.env)
                last = one
            else:
                still.append(one)
        running = still
    alone = float(np.median([ask([last])[1] for _ in range(timed_alone)]))
    return Rollouts(success, steps, calls, alone, policy.n_action_steps / alone)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share; unlike the usual one it stays within 0 and 1, and is no point at either."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("policy", type=Path, help="what train.py wrote, or a folder of weights")
    args.add_argument("--task", required=True)
    args.add_argument("--episodes", type=int, default=100)
    args.add_argument("--seed", type=int, default=demonstrations.EVALUATION_SEED)
    args.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddpm")
    args.add_argument("--steps", type=int, default=100, help="denoising steps")
    args.add_argument("--at-once", type=int, default=25)
    args.add_argument("--device", default="cpu")
    o = args.parse_args()
    policy = DiffusionTransformerLowdimPolicy.load(o.policy).to(o.device)
    use_sampler(policy, o.sampler, o.steps)
    found = rollout(policy, o.task, o.episodes, o.seed, at_once=o.at_once, device=o.device)
    successes = int(found.success.sum())
    low, high = wilson(successes, o.episodes)
    print(f"success {successes} of {o.episodes}: {successes / o.episodes:.1%} (95 %: {low:.1%} to {high:.1%})")
    if successes:
        print(f"steps until success: {found.steps[found.success].mean():.0f} on average")
    batch = np.mean([size for size, _ in found.calls])
    print(f"predict_action: {found.seconds_per_call:.3f} s in batches of {batch:.1f}, {found.alone_s:.3f} s alone")
    print(f"control rate: {found.control_rate:.1f} actions a second")


if __name__ == "__main__":
    main()
