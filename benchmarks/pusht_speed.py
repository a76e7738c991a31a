"""How fast does a diffusion policy answer in PushT? Speed only: the weights are random, and no block is pushed home.

    pip install gym-pusht==0.1.8 && python benchmarks/pusht_speed.py

A policy of the size that diffusion_policy trains for PushT (DP-T: 8 layers of 256 channels, 16 actions ahead, 2
observations back, 8 actions carried out, 100 steps of DDPM) plays ``gym_pusht/PushT-v0``: it is asked, its actions are
carried out, it is asked again. An observation is what the environment has nearest to the 20 numbers of the original: 8
keypoints of the block and the robot's place, 18 numbers (the original has 9 keypoints).

In full, with reuse, extrapolation and BAC's schedule, and with fewer steps (DDIM); one robot, and 16 at once. Every
method has robots of its own. They take turns, one call each, so that a machine that slows down slows all. BAC's
schedule is calibrated on the random weights too: how much it computes is its budget, when it does means nothing. Prints
the table and writes ``results/pusht-speed.md``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "policy"))
from model import DiffusionTransformerLowdimPolicy, Shape, use_sampler

from diffcache import CacheSchedule, accelerate, measure, plan, report
from diffcache.demo.run import machine
from diffcache.documents import files

RESULTS = Path(__file__).parent / "results"
KEYPOINTS = 16  # numbers: 8 places on the block
SHAPE = Shape(obs_dim=KEYPOINTS + 2, action_dim=2)
FIELD = 512.0  # side of the square that places and actions lie in
SEED = 100_000  # of the first robot; diffusion_policy's test episodes begin there
BUDGET = 10  # steps' work for BAC
TOGETHER = 16


class Robots:
    """Environments side by side, and what the policy has seen of them. One whose episode ends begins the next."""

    def __init__(self, count: int) -> None:
        make = {"obs_type": "environment_state_agent_pos", "disable_env_checker": True}
        self.envs = [gymnasium.make("gym_pusht/PushT-v0", **make) for _ in range(count)]
        self.seen = [self._begin(n, seed=SEED + n) for n in range(count)]

    def _begin(self, n: int, seed: int | None = None) -> deque[np.ndarray]:
        first = flat(self.envs[n].reset(seed=seed)[0])
        return deque([first] * SHAPE.n_obs_steps, maxlen=SHAPE.n_obs_steps)

    def observed(self) -> Tensor:
        """float32 [robots, To, O]"""
        return torch.from_numpy(np.stack([np.stack(seen) for seen in self.seen]))

    def act(self, actions: np.ndarray) -> tuple[float, int]:
        """Carry out ``actions`` [robots, n, 2], one robot after the other. Seconds in the environments, their steps."""
        seconds, steps = 0.0, 0
        for n, env in enumerate(self.envs):
            for action in np.clip(actions[n], 0, FIELD):
                began = time.perf_counter()
                observation, _, terminated, truncated, _ = env.step(action)
                seconds += time.perf_counter() - began
                steps += 1
                self.seen[n].append(flat(observation))
                if terminated or truncated:
                    self.seen[n] = self._begin(n)
                    break  # what is left of the answer was meant for the episode that is over
        return seconds, steps


def flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [O]: keypoints, then the robot's place."""
    return np.concatenate([observation["environment_state"], observation["agent_pos"]]).astype(np.float32)


@dataclass
class Row:
    """One method: its policy and robots, and what was measured of each call.

    calls        seconds of ``predict_action``
    environment  seconds of one step of one robot's environment, mean over the call
    """

    name: str
    policy: DiffusionTransformerLowdimPolicy
    robots: Robots
    accelerated: bool
    calls: list[float] = field(default_factory=list)
    environment: list[float] = field(default_factory=list)
    forwards: int = 0

    @property
    def count(self) -> int:
        return len(self.robots.envs)

    def turn(self, seed: int) -> None:
        """One answer, and its actions carried out. Noise is drawn from ``seed``, the same for every method."""
        obs = {"obs": self.robots.observed()}
        generator = torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        actions = self.policy.predict_action(obs, generator=generator)["action"]
        self.calls.append(time.perf_counter() - began)
        seconds, steps = self.robots.act(actions.numpy())
        self.environment.append(seconds / steps)

    def warm_up(self) -> None:
        """One turn that is not timed. Forwards that reach the layers are counted in it, not taken from a schedule."""
        reached: list[bool] = []
        hook = self.policy.model.decoder.register_forward_hook(lambda *_: reached.append(True))
        self.turn(seed=0)
        hook.remove()
        self.forwards = len(reached)
        self.calls.clear()
        self.environment.clear()

    @property
    def share(self) -> float:
        """Of the attentions and feed-forwards that the sampler's own steps would run: how many ran, in the last
        call."""
        inside = [r for r in report(self.policy).rows if r.site.startswith("sublayer:")] if self.accelerated else []
        if not inside:
            return self.forwards / self.policy.num_inference_steps
        ran = sum(r.computed + r.guarded + sum(r.failed_open.values()) for r in inside)
        return ran / (ran + sum(r.predicted for r in inside))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--calls", type=int, default=30, help="of predict_action that are timed, for every method")
    args.add_argument("--out", type=Path, default=RESULTS, help="folder")
    o = args.parse_args()
    made = rows()
    for row in made:
        row.warm_up()
    for call in range(o.calls):
        for row in made:
            row.turn(seed=1 + call)
        print(f"{call + 1} of {o.calls} calls", file=sys.stderr, flush=True)
    text = "\n\n".join([circumstances(o.calls), table(made)])
    o.out.mkdir(parents=True, exist_ok=True)
    files.write(o.out / "pusht-speed.md", f"{text}\n")
    print(text)


def rows() -> list[Row]:
    """Every method, ready to be asked."""
    torch.manual_seed(0)
    weights = DiffusionTransformerLowdimPolicy(SHAPE).eval()
    ends = torch.tensor([[0.0], [FIELD]])
    for name, channels in (("obs", SHAPE.obs_dim), ("action", SHAPE.action_dim)):
        weights.normalizer[name].fit(ends.expand(2, channels))  # the field, for there is no data

    def row(name: str, sampler: str, steps: int, schedule: str | CacheSchedule | None = None, robots: int = 1) -> Row:
        policy = DiffusionTransformerLowdimPolicy(SHAPE).eval()
        policy.load_state_dict(weights.state_dict(), assign=True)  # the same memory: none finds its weights colder
        use_sampler(policy, sampler, steps)
        if schedule is not None:
            accelerate(policy, schedule)
        return Row(name, policy, Robots(robots), accelerated=schedule is not None)

    return [
        row("DDPM-100, full", "ddpm", 100),
        row("DDPM-100, `uniform:every=5`", "ddpm", 100, "uniform:every=5"),
        row("DDPM-100, `uniform:every=10`", "ddpm", 100, "uniform:every=10"),
        row("DDPM-100, `taylorseer:every=5,order=1`", "ddpm", 100, "taylorseer:every=5,order=1"),
        row(f"DDPM-100, BAC, {BUDGET} steps' work", "ddpm", 100, bac(weights)),
        row("DDIM-16, full", "ddim", 16),
        row("DDIM-16, `uniform:every=2`", "ddim", 16, "uniform:every=2"),
        row("DDIM-10, full", "ddim", 10),
        row("DDPM-100, full", "ddpm", 100, robots=TOGETHER),
        row("DDPM-100, `uniform:every=5`", "ddpm", 100, "uniform:every=5", robots=TOGETHER),
    ]


def bac(policy: DiffusionTransformerLowdimPolicy) -> CacheSchedule:
    """Calibrated as BAC is: on one call, with the first observation of an episode."""
    calls: list[dict[str, Any]] = [{"obs_dict": {"obs": Robots(1).observed()}, "seed": 0}]
    return plan(measure(policy, calls, sites="sublayer", influence=False), "bac:n=5", BUDGET)


def circumstances(calls: int) -> str:
    """What a reader needs to judge the numbers by."""
    versions = {name: importlib.metadata.version(name) for name in ("gym-pusht", "gymnasium", "pymunk")}
    told = ", ".join(f"{key} {value}" for key, value in (machine() | versions).items())
    s = SHAPE
    return (
        f"**Speed only: random weights.** {told}, CPU.\n\n"
        f"`gym_pusht/PushT-v0`, observation `environment_state_agent_pos` ({s.obs_dim} numbers), {s.action_dim} "
        f"numbers an action; {s.n_obs_steps} observations, horizon {s.horizon}, {s.n_action_steps} actions done; "
        f"{s.layers} layers × {s.width}. Medians of {calls} calls of `predict_action`, the methods in turn. Speed-ups "
        "are over the full run of the same turn with as many robots. Environments are stepped one after the other; a "
        "step is 0.1 s of its robot's time, so 10 actions a second keep up with one robot."
    )


def table(made: list[Row]) -> str:
    """Markdown. What is compared with the full run is compared turn by turn, with as many robots."""
    heads = "forwards computed, sublayers computed, s a call, quartiles, speed-up, actions a second, "
    heads += "with the environment's steps, environment: ms a step"
    lines = [f"| method | robots | {heads.replace(', ', ' | ')} |", "|---" + 9 * "|---:" + "|"]
    full: dict[int, Row] = {}
    for row in made:
        against = full.setdefault(row.count, row)  # the first with that many robots
        low, seconds, high = np.percentile(row.calls, [25, 50, 75])
        speedup = np.median(np.array(against.calls) / row.calls)
        step = float(np.median(row.environment))
        actions = row.count * SHAPE.n_action_steps
        lines.append(
            f"| {row.name} | {row.count} | {row.forwards} of {row.policy.num_inference_steps} | {row.share:.1%} "
            f"| {seconds:.4f} | {low:.4f} – {high:.4f} | {speedup:.2f}x | {actions / seconds:.1f} "
            f"| {actions / (seconds + actions * step):.1f} | {1e3 * step:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
