"""A trained diffusion policy on its task: what caching it buys beside other samplers, at the same work.

    python benchmarks/policy.py runs/drawer-open/policy.safetensors --task drawer-open-v3 \
        --demonstrations demonstrations/drawer-open-v3.npz

The policy is asked in full (DDPM, 100 steps); with ours, schedules fitted on observations of demonstrations; with BAC's
schedules, with and without the bubbling union, and with one mask for all sublayers; with uniform reuse; and with fewer
steps of DDPM, DDIM and DPM-Solver++. All answer the same held-out observations, one robot at a time (action error and
seconds), and play the same episodes with the same noise (success; in bfloat16 autocast, which halves the time).
``--sampler ddim --steps 16`` does the same on top of a sampler that is quick already. Prints the table and writes
``results/policy-TASK-SAMPLER-STEPS.md``; schedules and what was played lie under ``--out``, and a run that is stopped
goes on. ``--again`` measures action error and seconds anew: for a machine that was busy while episodes were played.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "policy"))
import rollouts
from model import SAMPLERS, DiffusionTransformerLowdimPolicy, use_sampler

from diffcache import CacheSchedule, evaluate, host, measure, optimize, plan
from diffcache.documents import files as document_files
from diffcache.eval.methods import Method, baselines, fewer_steps, ours
from diffcache.eval.noise_schedulers import noise_free_scheduler
from diffcache.eval.saved_parts import slug
from diffcache.eval.trials import Trials

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 0.2  # of the demonstrations, from the end
AT_ONCE = 60  # episodes side by side
CALIBRATION = 4, 16  # calls, observations in each


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("policy", type=Path)
    args.add_argument("--task", required=True)
    args.add_argument("--demonstrations", type=Path, required=True)
    args.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddpm")
    args.add_argument("--steps", type=int, default=100)
    args.add_argument("--budget", type=int, action="append", help="computed steps; by default a fifth and a tenth")
    args.add_argument("--episodes", type=int, default=300)
    args.add_argument("--observations", type=int, default=64, help="held-out ones, for action error and seconds")
    args.add_argument("--out", type=Path, help="folder; by default policy-TASK-SAMPLER-STEPS")
    args.add_argument("--again", action="store_true", help="measure action error and seconds anew")
    o = args.parse_args()
    policy = DiffusionTransformerLowdimPolicy.load(o.policy)
    use_sampler(policy, o.sampler, o.steps)
    name = f"{o.task}-{o.sampler}-{o.steps}"
    out = o.out or Path(f"policy-{name}")
    if o.again:
        shutil.rmtree(out / "parts", ignore_errors=True)
    seen = Observations(o.demonstrations, policy.n_obs_steps)
    budgets = sorted(o.budget or [max(2, o.steps // 5), max(2, o.steps // 10)], reverse=True)
    files = [o.demonstrations, *(sorted(o.policy.iterdir()) if o.policy.is_dir() else [o.policy])]
    made_from = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    calibration = [seen.call(CALIBRATION[1], held_out=False, seed=n) for n in range(CALIBRATION[0])]
    found = evaluate(
        policy,
        methods(policy, calibration, budgets, out, made_from),
        [seen.call(1, held_out=True, seed=10_000 + n) for n in range(o.observations)],
        compare=others(policy, o.steps, budgets),
        trials=Trials(lambda asked, n: played(asked, o.task, n), o.episodes, o.task),
        title=f"{o.task}: a transformer diffusion policy, {o.sampler.upper()}, {o.steps} steps",
        out=out,
    )
    rates = [
        f"| {m['name']} | {policy.n_action_steps / m['seconds']['pipeline']['median']:.1f} |"
        for m in found.record["methods"]
    ]
    told = "\n".join(["| method | actions a second, one robot |", "| --- | ---: |", *rates])
    document_files.write(RESULTS / f"policy-{name}.md", f"{found}\n\n{told}\n")
    print(f"{found}\n\n{told}\n\nreport: {found.report}")


def played(policy: Any, task: str, episodes: int) -> Any:
    """bool [episodes], of success."""
    with torch.autocast("cpu", torch.bfloat16):
        return rollouts.rollout(policy, task, episodes, at_once=AT_ONCE).success


def methods(policy: Any, calls: list[dict[str, Any]], budgets: list[int], out: Path, made_from: str) -> list[Method]:
    """Ours, and BAC's, which is a schedule here as well. Made once; a run that goes on takes them from ``out``.

    made_from  digest of the policy and its demonstrations: schedules of others are not taken for theirs
    """
    most = budgets[0]
    plans = {
        **{f"diffcache, {n} computed": functools.partial(optimize, policy, calls, n) for n in budgets},
        f"diffcache, sublayers, {most} steps' work": functools.partial(
            optimize, policy, calls, most, sites="sublayer", scheduler="allocate:cost=flops"
        ),
        f"BAC, {most} steps' work": functools.partial(bac, policy, calls, "bac:n=5", most),
        f"BAC without bubbling, {most} updates": functools.partial(bac, policy, calls, "bac:n=0", most),
        f"BAC unified, {most} updates": functools.partial(bac, policy, calls, "bac:n=0,unified=1", most),
    }
    found = []
    (out / "schedules").mkdir(parents=True, exist_ok=True)
    for name, make in plans.items():
        file = out / "schedules" / f"{slug(name)}-{made_from[:8]}.safetensors"
        if not file.exists():
            make().save(file)
        method = ours(name, CacheSchedule.load(file))
        found.append(dataclasses.replace(method, kind="peer") if name.startswith("BAC") else method)
    return found


def bac(policy: Any, calls: list[dict[str, Any]], scheduler: str, n: int) -> CacheSchedule:
    """As its authors do, from one call."""
    return plan(measure(policy, calls[:1], sites="sublayer", influence=False), scheduler, n)


def others(policy: Any, steps: int, budgets: list[int]) -> list[Method]:
    """Fewer steps and uniform reuse, of as many computed steps; for DDPM, DDIM's usual 16 too."""
    loop = host.adopted(policy)
    found = baselines(loop, steps, budgets)
    ddim = noise_free_scheduler(loop.scheduler)
    return found if ddim is None or 16 in budgets else [*found, fewer_steps(loop, 16, solver=ddim)]


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
