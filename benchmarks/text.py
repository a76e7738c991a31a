"""Compare token rules and token schedules on the text model: exact match, agreement, tokens per second.

    python benchmarks/text.py --prompts 500 --length 128 256 --batch 8 1

A cell (task, length of a canvas, batch) is run in parts of a few prompts, in which the calls of all methods alternate.
Each part is added to ``results/text.json`` when it ends, so a run continues where the last one stopped, and the cells
grow in turns. Some rules run in the first part of the first cell of a task only. Schedules are calibrated on prompts
that no cell uses, at 256 positions and a batch of 8. They serve the other cells unchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffcache import Budget, Loop, TokenSchedule
from diffcache.assets.text import is_exact, load_text, text_calls
from diffcache.assets.text_tasks import TASKS
from diffcache.eval import evaluate_text, token_method
from diffcache.eval.text import TextResult, mcnemar, table, wilson
from diffcache.profiling import DecodingCalibration

RESULTS = Path(__file__).parent / "results"
CALIBRATION = 24  # prompts
FIRST_SEED = 100  # of the prompts of the first part; that of the calibration is 1
CALIBRATION_LENGTH = 128  # tokens of a prompt
THRESHOLD = 0.9  # Fast-dLLM's, of commits by confidence
SPEEDUPS = (3.0, 4.0, 5.0)  # targets, against the loop that commits one token in each step
PARALLEL_SPEEDUPS = (1.5, 2.0, 2.5)  # targets, against the loop that commits by confidence
RULES = {
    "dKV-Cache, refresh 8": "dkv:refresh=8",
    "Fast-dLLM, prefix": "prefix:block=32",
    "Fast-dLLM, dual": "dual:block=32",
}
FIRST_PART = {
    "full rule": "full",
    "dKV-Cache, refresh 32": "dkv:refresh=32",
    "dInfer, vicinity": "vicinity:block=32",
    "Elastic-Cache": "elastic:window=32",
}

KEYS = {task: f"{task}, {2 * CALIBRATION_LENGTH} positions, batch 8" for task in TASKS}

Schedules = dict[float, TokenSchedule]


def methods(schedules: Schedules, parallel: Schedules, *, first: bool) -> list[Any]:
    """Return the methods of a part: fewer steps, rules and schedules, alone and with commits by confidence.

    Args:
        schedules: Target speed-up -> schedule, for one token in each step.
        parallel: The same for commits by confidence.
        first: Whether to run every rule.
    """
    rules: dict[str, Any] = RULES | (FIRST_PART if first else {})
    found = [token_method(f"{n} tokens per step", per_step=n) for n in ((2, 4) if first else (4,))]
    found += [token_method(name, rule) for name, rule in rules.items()]
    found += [token_method(f"diffcache, target {speed:g}x", one) for speed, one in schedules.items()]
    if first:
        middle = schedules[SPEEDUPS[1]]
        name = f"diffcache, target {SPEEDUPS[1]:g}x"
        found += [token_method(f"{name}, {form}", middle, store=form) for form in ("int8", "int4")]
    found.append(token_method("by confidence", threshold=THRESHOLD))
    named = rules | {f"diffcache, target {speed:g}x": one for speed, one in parallel.items()}
    return found + [
        token_method(f"by confidence, {name}", rule, threshold=THRESHOLD)
        for name, rule in named.items()
        if name != "full rule"
    ]


def calibrated(loop: Loop, task: str, *, parallel: bool) -> Schedules:
    """Return the schedules of a task, target speed-up -> schedule. They are kept in ``results/text-schedules``."""
    folder = RESULTS / "text-schedules"
    folder.mkdir(parents=True, exist_ok=True)
    speedups, kind = (PARALLEL_SPEEDUPS, "parallel") if parallel else (SPEEDUPS, "single")
    files = {speed: folder / f"{task}-{kind}-{speed:g}x.safetensors" for speed in speedups}
    if not all(file.exists() for file in files.values()):
        calls = text_calls(task, CALIBRATION, length=CALIBRATION_LENGTH, seed=1)
        change = {"threshold": THRESHOLD} if parallel else {}
        calibration = DecodingCalibration.record(loop, [{**call, **change} for call in calls], progress=False)
        for speed, file in files.items():
            schedule = calibration.schedule(Budget(speedup=speed))
            schedule.save(file)
            print(f"{task}, {kind}, target {speed:g}x\n{schedule}", flush=True)
    return {speed: TokenSchedule.load(file) for speed, file in files.items()}


def part_size(length: int, batch: int) -> int:
    """Return the number of prompts in a part of a cell, so that parts take about as long."""
    return max(8, 4 * batch * CALIBRATION_LENGTH // length)


def merged(parts: list[list[dict[str, Any]]]) -> list[TextResult]:
    """Return the results on the prompts of all parts together. A method may be in some parts only.

    Args:
        parts: For each part, the fields of the result of each method, the full run first.
    """
    names = list(dict.fromkeys(one["name"] for part in parts for one in part))
    found = []
    for name in names:
        pairs = [(one, part[0]) for part in parts for one in part if one["name"] == name]
        ones = [one for one, _ in pairs]
        answers = sum(one["answers"] for one in ones)
        seconds = [second for one in ones for second in one["seconds"]]
        before = [second for _, full in pairs for second in full["seconds"]]
        better, worse = (sum(one[field] for one in ones) for field in ("better", "worse"))
        forwards = sum(one["forwards"] for one in ones)

        def mean(field: str, weight: str, ones: list[dict[str, Any]] = ones) -> float:
            return float(np.average([one[field] for one in ones], weights=[one[weight] for one in ones]))

        found.append(
            TextResult(
                name=name,
                rule=ones[0]["rule"],
                change=ones[0]["change"],
                answers=answers,
                exact=wilson(round(sum(one["exact"][0] * one["answers"] for one in ones)), answers),
                better=better,
                worse=worse,
                p_value=mcnemar(better, worse),
                same_tokens=mean("same_tokens", "answers"),
                same_answers=mean("same_answers", "answers"),
                seconds=tuple(seconds),
                tokens_per_s=sum(one["tokens_per_s"] * sum(one["seconds"]) for one in ones) / sum(seconds),
                speedup=float(np.median(np.array(before) / np.array(seconds))),
                forwards=forwards,
                computed=mean("computed", "forwards"),
                peak_bytes=max(one["peak_bytes"] for one in ones),
            )
        )
    return found


def main() -> None:
    """Add parts to the cells until each has enough prompts, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--length", type=int, nargs="+", default=[128, 256], help="tokens of a prompt; half a canvas")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=TASKS)
    given = parser.parse_args()
    model = load_text()
    loop = Loop(model.network, model.sample)
    file = RESULTS / "text.json"
    cells = json.loads(file.read_text()) if file.exists() else {}
    schedules = {task: [calibrated(loop, task, parallel=parallel) for parallel in (False, True)] for task in given.task}
    every = list(itertools.product(given.length, given.batch, given.task))
    for number in range(given.prompts):
        for length, batch, task in every:
            key = f"{task}, {2 * length} positions, batch {batch}"
            parts, size = cells.setdefault(key, []), part_size(length, batch)
            count = min(size, given.prompts - number * size)
            if len(parts) > number or count < 1:
                continue
            calls = text_calls(task, count, length=length, batch_size=batch, seed=FIRST_SEED + number)
            first = number == 0 and (length, batch) == (given.length[0], given.batch[0])
            compared = methods(*schedules[task], first=first)
            with tempfile.TemporaryDirectory() as folder:
                found = evaluate_text(loop, compared, calls, score=is_exact, out=folder)
            parts.append([asdict(one) for one in found.results])
            settings = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
            for one in parts[-1]:
                one["settings"] = settings
            file.write_text(json.dumps(cells, indent=1, default=str) + "\n")
            write(cells)
            print(f"{key}, part {number + 1}", flush=True)


def write(cells: dict[str, Any]) -> None:
    """Write the tables of all cells as one page."""
    lines = [
        "# Token rules and schedules on the text model",
        "",
        "`python benchmarks/text.py`. An answer is right if every token is. *against full*: answers won and lost",
        "against the full run, with McNemar's exact test. *by confidence*: a step commits every token of probability",
        f"{THRESHOLD} or more, and at least one. Speed-ups are against the full run, which commits one token per step.",
        "*target*: the speed-up that the schedule was asked for, against the loop that it was calibrated on.",
    ]
    for key, parts in sorted(cells.items()):
        if not parts:
            continue
        found = merged(parts)
        settings = "; ".join(sorted({part[0]["settings"] for part in parts}))
        lines += ["", f"## {key.capitalize()}", "", f"{settings}.", ""]
        head, rule, *rows = table(found).splitlines()
        lines += [f"| prompts {head}", f"|---{rule}"]
        lines += [f"| {one.answers} {row}" for one, row in zip(found, rows, strict=True)]
    (RESULTS / "text.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "text-summary.md").write_text(summary(cells) + "\n")


SUMMARY = {  # name in the tables -> name in the summary
    "full run": "full run",
    "4 tokens per step": "no cache, 4 tokens per step",
    "dKV-Cache, refresh 8": "dKV-Cache, `dkv:refresh=8`",
    "Fast-dLLM, dual": "Fast-dLLM's dual cache, `dual:block=32`",
    **{f"diffcache, target {speed:g}x": f"**`optimize`, `Budget(speedup={speed:g})`**" for speed in SPEEDUPS},
    "by confidence": "no cache, by confidence",
    "by confidence, dKV-Cache, refresh 8": "dKV-Cache, by confidence",
    "by confidence, Fast-dLLM, dual": "dual cache, by confidence",
    **{
        f"by confidence, diffcache, target {speed:g}x": f"**`optimize` on this loop, `Budget(speedup={speed:g})`**"
        for speed in PARALLEL_SPEEDUPS
    },
}


def summary(cells: dict[str, Any]) -> str:
    """Return a short table of the main methods, with both tasks side by side: cells of 256 positions, batches of 8."""
    found = {task: {one.name: one for one in merged(cells[key])} for task, key in KEYS.items() if cells.get(key)}
    lines = [
        "| method |" + "".join(f" {task}: speed-up | right |" for task in found),
        "|---|" + "---:|---:|" * len(found),
    ]
    for name, title in SUMMARY.items():
        cells_of_row = ""
        for rows in found.values():
            one = rows[name]
            exact = one.exact or (0.0, 0.0, 0.0)
            cells_of_row += f" {one.speedup:.2f}x | {round(exact[0] * one.answers)} of {one.answers} |"
        lines.append(f"| {title} |{cells_of_row}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
