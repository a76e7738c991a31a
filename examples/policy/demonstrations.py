"""Scripted demonstrations in Meta-World, recorded from the states that its experts see.

    python demonstrations.py --out demonstrations --task drawer-open-v3 --task push-v3

Writes one ``TASK.npz`` per task: ``observations`` float32 [N, 39], ``actions`` float32 [N, 4], and ``ends`` int64 [E],
where each episode ends (exclusive). These are programs at work in a simulator, neither people nor robots.
Needs ``pip install metaworld==3.1.1``; no display and no OpenGL.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

TASKS = ("push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3")
STEPS = 500  # the simulator refuses to go on after so many

# Placements come in blocks of fifty with consecutive seeds, so these are far enough apart for any number of episodes.
TRAINING_SEED = 0
EVALUATION_SEED = 100_000


def placements(task: str, seed: int) -> Iterator[Any]:
    """Where objects and goal are, one episode after the other, without end; for the environment's ``set_task``.

    A benchmark draws fifty placements from its seed and then only chooses among them: one benchmark for training and
    evaluation would show the policy again what it was trained on. "MT" benchmarks let the observation end with the
    goal's place; "ML" benchmarks put zeros there, and a policy for push or pick-place could not know where to go.
    """
    for block in itertools.count(seed):
        yield from metaworld.MT1(task, seed=block).train_tasks


def environment(task: str) -> Any:
    """An environment that wants a placement (``set_task``) before ``reset``. Building it takes about a second."""
    return metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()


def demonstrate(
    env: Any, expert: Any, rng: np.random.Generator, *, noise: float = 0.1, stay: int = 20
) -> tuple[np.ndarray, np.ndarray] | None:
    """One episode: observations [L, 39] and the expert's actions [L, 4], or None if it did not end in success.

    What is executed is a little off what the expert wants and what is recorded, so that the policy is also shown how to
    come back from places where only mistakes lead. The episode goes on for ``stay`` steps after the first success, so
    that it is shown as well what to do when all is done.
    """
    observation, _ = env.reset()
    observations, actions, first = [], [], None
    for step in range(STEPS):
        action = np.clip(expert.get_action(observation), -1, 1)
        observations.append(observation)
        actions.append(action)
        executed = np.clip(action + noise * rng.standard_normal(action.shape), -1, 1)
        observation, _, _, _, info = env.step(executed.astype(np.float32))
        if first is None and info["success"]:
            first = step
        if first is not None and step == first + stay:
            break
    if first is None or not info["success"]:
        return None
    return np.asarray(observations, np.float32), np.asarray(actions, np.float32)


def collect(task: str, episodes: int, seed: int = TRAINING_SEED, **options: float) -> tuple[dict[str, np.ndarray], int]:
    """``episodes`` successes as the arrays of a file, and how many attempts they took."""
    env, expert, rng = environment(task), ENV_POLICY_MAP[task](), np.random.default_rng(seed)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for attempts, placement in enumerate(placements(task, seed), 1):
        env.set_task(placement)
        found = demonstrate(env, expert, rng, **options)
        kept += [found] if found else []
        if len(kept) == episodes:
            break
        if attempts >= 100 and len(kept) < attempts / 4:
            raise RuntimeError(f"{task}: the expert succeeded in {len(kept)} of {attempts} attempts.")
    observations, actions = zip(*kept, strict=True)
    ends = np.cumsum([len(part) for part in actions])
    arrays = {"observations": np.concatenate(observations), "actions": np.concatenate(actions), "ends": ends}
    return arrays, attempts


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--out", type=Path, required=True, help="a folder")
    args.add_argument("--task", action="append", choices=sorted(ENV_POLICY_MAP), help="default: " + ", ".join(TASKS))
    args.add_argument("--episodes", type=int, default=200)
    args.add_argument("--seed", type=int, default=TRAINING_SEED)
    args.add_argument("--noise", type=float, default=0.1, help="standard deviation of what is added to actions")
    args.add_argument("--stay", type=int, default=20, help="steps after the first success")
    o = args.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    for task in o.task or TASKS:
        arrays, attempts = collect(task, o.episodes, o.seed, noise=o.noise, stay=o.stay)
        np.savez_compressed(o.out / f"{task}.npz", **arrays)
        length = np.diff(arrays["ends"], prepend=0)
        print(
            f"{task}: {o.episodes} episodes of {attempts} attempts, {length.sum()} steps, "
            f"{length.min()} to {length.max()} each, {length.mean():.0f} on average",
            flush=True,
        )


if __name__ == "__main__":
    main()
