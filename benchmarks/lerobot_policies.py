"""Policies of an installed lerobot, built small with random weights: what can be cached, and whether it holds.

    pip install 'lerobot[pi,smolvla]' diffcache && python benchmarks/lerobot_policies.py    # Python 3.12 or newer

The classes are lerobot's own (``lerobot_builders.py``). For each granularity of sites: whether all computed steps give
the untouched policy's actions bit for bit, and what every second step computed does. Of vision-language-action models
also what a robot and a training need of them. Prints two tables and writes ``results/lerobot.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import lerobot
import torch
import transformers
from lerobot_builders import HORIZON, POLICIES, SAMPLES, STEPS, VLAS, Built, chunked
from torch import Tensor

import diffcache
from diffcache.documents import files
from diffcache.errors import DiffCacheError, UnsupportedModel

RESULTS = Path(__file__).parent / "results"
HALF = "uniform:every=2"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = ["| policy | sites | bit-equal, all computed | computed and predicted | error of the actions | fit |"]
    rows.append("|---|---|---|---:|---:|---|")
    for name, make in POLICIES.items():
        torch.manual_seed(0)
        policy, call = make()
        for sites in ("model", "stack", "block", "sublayer"):
            rows += [f"| {name} | {cells} |" for cells in tried(policy, call, sites)]
    habits = ["| policy | " + " | ".join(HABITS) + " |", "|---" * (len(HABITS) + 1) + "|"]
    for name, make in VLAS.items():
        cells = [answer if isinstance(answer := asked(make), str) else yes(answer) for asked in HABITS.values()]
        habits.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (lerobot, torch, diffusers, transformers))
    table = "\n".join([f"{versions}, random weights, {STEPS} evaluations a run.", "", *rows, "", *habits])
    files.write(RESULTS / "lerobot.md", f"{table}\n")
    print(table)


def yes(held: bool) -> str:
    return "yes" if held else "**no**"


def copied(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in batch.items()}


def tried(policy: Any, call: dict[str, Any], sites: str) -> list[str]:
    """One row, or none where the network has no such sites."""

    def actions() -> Tensor:
        torch.manual_seed(1)
        return policy.predict_action_chunk(**call | {"batch": copied(call["batch"])})

    full = actions()
    try:
        with diffcache.accelerated(policy, f"full:sites={sites}"):
            same = torch.equal(actions(), full)
    except DiffCacheError:
        return []
    with diffcache.accelerated(policy, f"{HALF},sites={sites}"):
        error = float((actions() - full).norm() / full.norm())
        counts = {(row.computed, row.predicted) for row in diffcache.report(policy).rows if row.site.startswith(sites)}
    fit = ""
    if sites == "model":
        schedule = diffcache.optimize(policy, [call | {"seed": n} for n in range(4)], 8, time_limit_s=0)
        fit = f"to the {schedule.provenance['fit_target']}"
    told = ", ".join(f"{a} and {b}" for a, b in sorted(counts))
    return [f"{sites} | {yes(same)} | {told} | {error:.4f} | {fit}"]


def queue_as_ever(make: Callable[..., Built]) -> bool:
    """A robot asks for one action after the other; the policy answers from a queue, and fills it every few."""
    policy, call = make()

    def played() -> Tensor:
        policy.reset()
        torch.manual_seed(2)
        return torch.stack([policy.select_action(copied(call["batch"])) for _ in range(HORIZON)])

    full = played()
    with diffcache.accelerated(policy, "full"):
        same = torch.equal(played(), full)
    with diffcache.accelerated(policy, HALF):
        first = played()
        again = torch.equal(played(), first)
        row = diffcache.report(policy).rows[0]
    halved = (row.computed, row.predicted) == (STEPS // 2, STEPS // 2) and not torch.equal(first, full)
    return same and again and halved and torch.equal(played(), full)


def training_as_ever(make: Callable[..., Built]) -> bool:
    """Loss and gradients of an accelerated policy, at every site that it has."""
    policy, call = make()
    policy.train()
    batch = call["batch"] | {"action": torch.randn(SAMPLES, HORIZON, policy.config.action_feature.shape[0])}

    def learned() -> list[Tensor]:
        torch.manual_seed(3)
        policy.zero_grad()
        loss, _ = policy.forward(copied(batch))
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    plain = learned()
    for sites in ("model", "block", "sublayer"):
        try:
            diffcache.accelerate(policy, f"{HALF},sites={sites}")
        except DiffCacheError:
            continue
        found = learned()
        diffcache.restore(policy)
        if len(found) != len(plain) or not all(map(torch.equal, found, plain)):
            return False
    return True


def gradients(make: Callable[..., Built]) -> str:
    """Of a run in real-time chunking: at how many computed and predicted steps the output carried any."""
    policy, call = chunked(make)
    inner, carried = policy.rtc_processor.denoise_step, []

    def denoise_step(*args: Any, original_denoise_step_partial: Callable[[Tensor], Tensor], **kwargs: Any) -> Tensor:
        def watched(x: Tensor) -> Tensor:
            carried.append((flow := original_denoise_step_partial(x)).requires_grad)
            return flow

        return inner(*args, original_denoise_step_partial=watched, **kwargs)

    policy.rtc_processor.denoise_step = denoise_step
    with diffcache.accelerated(policy, HALF):
        policy.predict_action_chunk(**call)
    return f"{sum(carried[::2])} computed, {sum(carried[1::2])} predicted"


def chunk_fits(make: Callable[..., Built]) -> str:
    """Error of a run in real-time chunking by a plan that was fitted without the last actions, and with them."""
    policy, call = chunked(make)

    def actions() -> Tensor:
        torch.manual_seed(1)
        return policy.predict_action_chunk(**call | {"batch": copied(call["batch"])})

    full, errors = actions(), []
    for fitted in ({"batch": call["batch"]}, call):
        schedule = diffcache.optimize(policy, [fitted | {"seed": n} for n in range(2, 6)], 8, time_limit_s=0)
        with diffcache.accelerated(policy, schedule):
            errors.append(float((actions() - full).norm() / full.norm()))
    return " and ".join(f"{error:.4f}" for error in errors)


def no_trace(make: Callable[..., Built]) -> bool:
    policy, call = make()

    def marks() -> list[set[str]]:
        return [set(vars(part)) for part in policy.modules()]

    def actions() -> Tensor:
        torch.manual_seed(1)
        return policy.predict_action_chunk(copied(call["batch"]))

    full, before = actions(), marks()
    diffcache.accelerate(policy, HALF)
    actions()
    on = marks() != before
    diffcache.restore(policy)
    return on and marks() == before and torch.equal(actions(), full)


def refused(make: Callable[..., Built]) -> str:
    policy, call = make(compile_model=True)
    for ask in (lambda: diffcache.accelerate(policy, HALF), lambda: diffcache.optimize(policy, [call], 8)):
        try:
            ask()
        except UnsupportedModel:
            continue
        return "**accepted**"
    return "refused"


HABITS: dict[str, Callable[[Callable[..., Built]], bool | str]] = {
    "`select_action`'s queue holds": queue_as_ever,
    "training bit-equal": training_as_ever,
    "steps with gradients in real-time chunking": gradients,
    f"its error at 8 of {STEPS}, fitted without and with the last chunk": chunk_fits,
    "restored without a trace": no_trace,
    "`compile_model=True`": refused,
}


if __name__ == "__main__":
    main()
