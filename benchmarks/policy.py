"""A trained diffusion policy on its task: what caching it buys beside other samplers, at the same work.

    python benchmarks/policy.py runs/drawer-open/policy.safetensors --task drawer-open-v3 \
        --demonstrations demonstrations/drawer-open-v3.npz

The policy is asked in full (DDPM, 100 steps); with ours, a schedule fitted on observations of demonstrations; with
BAC's schedules, with and without the bubbling union; with uniform reuse; and with fewer steps of DDPM, DDIM and
DPM-Solver++. All play the same episodes with the same noise, and answer the same held-out observations, one robot at a
time. ``--sampler ddim --steps 16`` does the same on top of a sampler that is quick already. Prints the table and writes
``results/policy-TASK.md``; what was played lies under ``--out``, and a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "policy"))
import rollouts
from model import SAMPLERS, DiffusionTransformerLowdimPolicy, use_sampler

from diffcache import evaluate, measure, optimize, plan
from diffcache.eval.methods import Method, ours
from diffcache.eval.trials import Trials

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 0.2  # of the demonstrations, from the end
CALIBRATION = 4, 16  # calls, observations in each


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("policy", type=Path)
    args.add_argument("--task", required=True)
    args.add_argument("--demonstrations", type=Path, required=True)
    args.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddpm")
    args.add_argument("--steps", type=int, default=100)
    args.add_argument("--budget", type=int, action="append", help="computed steps; by default a tenth and a fifth")
    args.add_argument("--episodes", type=int, default=300)
    args.add_argument("--observations", type=int, default=64, help="held-out ones, for action error and seconds")
    args.add_argument("--out", type=Path, help="folder; by default policy-TASK-SAMPLER-STEPS")
    o = args.parse_args()
    policy = DiffusionTransformerLowdimPolicy.load(o.policy)
    use_sampler(policy, o.sampler, o.steps)
    name = f"{o.task}-{o.sampler}-{o.steps}"
    seen = Observations(o.demonstrations, policy.n_obs_steps)
    budgets = o.budget or [max(2, o.steps // 5), max(2, o.steps // 10)]
    found = evaluate(
        policy,
        methods(policy, [seen.call(*CALIBRATION[1:], held_out=False, seed=n) for n in range(CALIBRATION[0])], budgets),
        [seen.call(1, held_out=True, seed=10_000 + n) for n in range(o.observations)],
        trials=Trials(lambda asked, n: rollouts.rollout(asked, o.task, n).success, o.episodes, o.task),
        title=f"{o.task}: a transformer diffusion policy, {o.sampler.upper()}, {o.steps} steps",
        out=o.out or Path(f"policy-{name}"),
    )
    rates = [
        f"| {m['name']} | {policy.n_action_steps / m['seconds']['pipeline']['median']:.1f} |"
        for m in found.record["methods"]
    ]
    told = "\n".join(["| method | actions a second, one robot |", "| --- | ---: |", *rates])
    (RESULTS / f"policy-{name}.md").write_text(f"{found}\n\n{told}\n")
    print(f"{found}\n\n{told}\n\nreport: {found.report}")


def methods(policy: Any, calls: list[dict[str, Any]], budgets: list[int]) -> list[Method]:
    """Ours, and BAC's, which is a schedule here as well."""
    profile = measure(policy, calls[:1], sites="sublayer", influence=False)  # BAC calibrates on one call
    found = []
    for n in budgets:
        found.append(ours(f"diffcache, {n} computed", optimize(policy, calls, n)))
    for n in budgets:
        found.append(ours(f"BAC, {n} steps' work", plan(profile, "bubbling:n=5", n)))
        found.append(ours(f"BAC without bubbling, {n} updates", plan(profile, "partition:kind=acs", n)))
    return found


class Observations:
    """What the expert saw, as the policy is given it."""

    def __init__(self, file: Path, n_obs_steps: int) -> None:
        with np.load(file) as arrays:
            self.rows, ends = arrays["observations"], arrays["ends"]
        begins = np.concatenate([[0], ends[:-1]])
        cut = round(len(ends) * (1 - HELD_OUT))
        self.length = n_obs_steps
        self.newest = [
            np.concatenate([np.arange(b + n_obs_steps - 1, e) for b, e in zip(begins[part], ends[part], strict=True)])
            for part in (slice(cut), slice(cut, None))
        ]

    def call(self, samples: int, *, held_out: bool, seed: int) -> dict[str, Any]:
        """Arguments of the policy: observations drawn by ``seed``, which is that of the noise too."""
        chosen = np.random.default_rng(seed).choice(self.newest[held_out], samples)
        steps = chosen[:, None] + np.arange(1 - self.length, 1)
        return {"obs_dict": {"obs": torch.from_numpy(self.rows[steps])}, "seed": seed}


if __name__ == "__main__":
    main()
