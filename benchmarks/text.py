"""Compare token rules and token schedules on the text model: exact match, agreement, tokens per second.

    python benchmarks/text.py --prompts 500 --length 128 256 --batch 1 8

Each cell (task, length of a canvas, batch) is one process-wide comparison: the calls of all methods alternate. A cell
that is already in ``results/text.json`` with as many prompts is not run again. Schedules are calibrated on prompts
that no cell uses.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffcache import Budget, Loop, TokenSchedule
from diffcache.assets.text import is_exact, load_text, text_calls
from diffcache.assets.text_tasks import TASKS
from diffcache.eval import evaluate_text, token_method
from diffcache.profiling import DecodingCalibration

RESULTS = Path(__file__).parent / "results"
SPEEDUPS = (2.0, 3.0, 4.0, 6.0)
CALIBRATION = 24  # prompts
THRESHOLD = 0.9  # Fast-dLLM's, of commits by confidence
RULES = {
    "full rule": "full",
    "dKV-Cache, refresh 8": "dkv:refresh=8",
    "dKV-Cache, refresh 32": "dkv:refresh=32",
    "Fast-dLLM, prefix": "prefix:block=32",
    "Fast-dLLM, dual": "dual:block=32",
    "dInfer, vicinity": "vicinity:block=32",
    "Elastic-Cache": "elastic:window=32",
}


def methods(schedules: dict[float, TokenSchedule]) -> list[Any]:
    """Return the methods of a cell: fewer steps, rules and schedules, alone and with commits by confidence."""
    found = [token_method(f"{n} tokens per step", per_step=n) for n in (2, 4)]
    found.append(token_method("by confidence", threshold=THRESHOLD))
    cached = {**RULES, **{f"diffcache, {speed:g}x": schedule for speed, schedule in schedules.items()}}
    found += [token_method(name, rule) for name, rule in cached.items()]
    found += [
        token_method(f"{name}, by confidence", rule, threshold=THRESHOLD)
        for name, rule in cached.items()
        if name != "full rule"
    ]
    middle = schedules[SPEEDUPS[1]]
    found += [token_method(f"diffcache, {SPEEDUPS[1]:g}x, {form}", middle, store=form) for form in ("int8", "int4")]
    return found


def calibrated(loop: Loop, task: str, length: int) -> dict[float, TokenSchedule]:
    """Return the schedules of a task, target speed-up -> schedule. They are kept in ``results/text-schedules``."""
    folder = RESULTS / "text-schedules"
    folder.mkdir(parents=True, exist_ok=True)
    files = {speed: folder / f"{task}-{2 * length}-{speed:g}x.safetensors" for speed in SPEEDUPS}
    if not all(file.exists() for file in files.values()):
        calls = text_calls(task, CALIBRATION, length=length, seed=1)
        calibration = DecodingCalibration.record(loop, calls, progress=False)
        for speed, file in files.items():
            calibration.schedule(Budget(speedup=speed)).save(file)
    found = {speed: TokenSchedule.load(file) for speed, file in files.items()}
    for speed, one in found.items():
        print(f"{task}, {speed:g}x\n{one}", flush=True)
    return found


def main() -> None:
    """Run the cells that are missing, and write the tables."""
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
    for length in given.length:
        for task in given.task:
            schedules = calibrated(loop, task, length)
            for batch in given.batch:
                key = f"{task}, {2 * length} positions, batch {batch}"
                if cells.get(key, {}).get("prompts", 0) >= given.prompts:
                    continue
                calls = text_calls(task, given.prompts, length=length, batch_size=batch, seed=2)
                with tempfile.TemporaryDirectory() as folder:
                    found = evaluate_text(loop, methods(schedules), calls, score=is_exact, out=folder)
                    table = (Path(folder) / "table.md").read_text()
                cells[key] = {
                    "prompts": given.prompts,
                    "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                    "torch": torch.__version__,
                    "table": table,
                    "methods": [asdict(one) for one in found.results],
                }
                file.write_text(json.dumps(cells, indent=1, default=str) + "\n")
                print(f"{key}\n{table}", flush=True)
    write(cells)


def write(cells: dict[str, Any]) -> None:
    """Write the tables of all cells as one page."""
    lines = [
        "# Token rules and schedules on the text model",
        "",
        "`python benchmarks/text.py`. Answers are right if every token is. *against full*: answers won and lost",
        "against the full loop, with McNemar's exact test. *by confidence*: a step also commits every token of",
        f"probability {THRESHOLD} or more. *diffcache, 3x*: the schedule of `Budget(speedup=3)`, in the folder",
        "`text-schedules`; 3x is its target, and the column *speed-up* is what was measured.",
    ]
    for key, cell in sorted(cells.items()):
        circumstances = f"{cell['prompts']} prompts, {cell['threads']} threads, torch {cell['torch']}"
        lines += ["", f"## {key.capitalize()}", "", f"{circumstances}.", "", cell["table"].rstrip()]
    (RESULTS / "text.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
