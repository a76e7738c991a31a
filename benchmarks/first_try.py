"""Compare the rules that need no calibration, on both demo models and three small ones.

    python benchmarks/tiny_models.py --digits package/src/digits --out tiny-models
    python benchmarks/first_try.py --tiny tiny-models

The constants of ``auto`` were chosen on measured profiles of the demo models, and its power without guidance on those
of all five models. Seeds and classes differ.

Writes ``results/first-try.md`` and ``.json``, and ``results/first-try-front-page.md`` for the README. Every row is one
model and setting. The columns are PSNR in dB of the final state, against the full run of the same seeds, at 2, 3 and 4
times fewer network evaluations. The peak is the range of each sample's final state.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tiny_models

from diffcache import accelerated, report
from diffcache.assets import load
from diffcache.documents import files
from diffcache.eval.noise_schedulers import better_noise_scheduler

RESULTS = Path(__file__).parent / "results"
SPEEDUPS = (2, 3, 4)
RULES = {
    "uniform reuse": "uniform:every={0}",
    "taylorseer": "taylorseer:every={0},order=1",
    "auto": "auto:speedup={0}",
}


@dataclass(frozen=True)
class Case:
    """One model and setting.

    Attributes:
        name: The row's name.
        host: The pipeline or loop.
        run: Returns the final states [N, …] of a run with a number of steps.
        set_noise_scheduler: Replaces the noise scheduler.
        steps: The number of steps of the full run.
    """

    name: str
    host: Any
    run: Callable[[int], np.ndarray]
    set_noise_scheduler: Callable[[Any], None]
    steps: int


def demo_cases(samples: int) -> Iterator[Case]:
    dpm = diffusers.DPMSolverMultistepScheduler
    for name, steps, guidance, solver in (
        ("dit", 50, 4.0, None), ("dit", 20, 4.0, dpm), ("dit", 50, 1.0, None), ("flux", 50, None, None),
        ("flux", 28, None, None),
    ):  # fmt: skip
        model = load(name)
        if solver is not None:
            model.pipe.scheduler = solver.from_config(model.pipe.scheduler.config)
        more = {"output_type": "latent"} if name == "flux" else {}
        more |= {} if guidance is None else {"guidance_scale": guidance}
        subjects = [model.subjects[i % len(model.subjects)] for i in range(40, 40 + samples)]

        def run(
            steps: int, model: Any = model, more: dict[str, Any] = more, subjects: list[str] = subjects
        ) -> np.ndarray:
            call = model.call(subjects, list(range(7000, 7000 + samples)), steps=steps, **more)
            return np.asarray(model.pipe(**call).images, dtype=np.float64)

        def put(solver: Any, pipe: Any = model.pipe) -> None:
            pipe.scheduler = solver

        title = f"{name}, {type(model.pipe.scheduler).__name__.removesuffix('Scheduler')}, {steps} steps"
        yield Case(title + (f", guidance {guidance:g}" if guidance else ""), model.pipe, run, put, steps)


def tiny_cases(folder: Path, samples: int) -> Iterator[Case]:
    euler = diffusers.EulerDiscreteScheduler
    for name, steps, guidance, solver in (
        ("unet", 50, 1.0, None), ("unet", 50, 3.0, None), ("unet", 28, 3.0, euler), ("flow", 50, 1.0, None),
        ("flow", 28, 3.0, None), ("signal", 50, 1.0, None), ("signal", 20, 1.0, None),
    ):  # fmt: skip
        scheduler = None if solver is None else solver.from_config(tiny_models.noise_scheduler(name).config)
        loop = tiny_models.loop(name, folder, scheduler)

        def run(steps: int, loop: Any = loop, guidance: float = guidance) -> np.ndarray:
            return loop(first=7000, count=samples, steps=steps, guidance=guidance).double().numpy()

        def put(solver: Any, loop: Any = loop) -> None:
            loop.sampler.scheduler = solver

        title = f"{name}, {type(loop.scheduler).__name__.removesuffix('Scheduler')}, {steps} steps"
        yield Case(title + (f", guidance {guidance:g}" if guidance > 1 else ""), loop, run, put, steps)


def psnr(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean PSNR in dB over samples [N, …]."""
    axes = tuple(range(1, found.ndim))
    mse = np.maximum(((found - reference) ** 2).mean(axes), 1e-20)
    return float(10 * np.log10((reference.max(axes) - reference.min(axes)) ** 2 / mse).mean())


def measure(case: Case) -> dict[str, dict[int, float]]:
    """Return method -> speed-up -> PSNR in dB."""
    reference = case.run(case.steps)
    found: dict[str, dict[int, float]] = {}
    own = case.host.scheduler
    for speedup in SPEEDUPS:
        fewer = round(case.steps / speedup)
        found.setdefault("fewer steps", {})[speedup] = psnr(case.run(fewer), reference)
        better = better_noise_scheduler(case.host.scheduler)
        if better is not None:
            case.set_noise_scheduler(better[1])
            found.setdefault("fewer steps, better solver", {})[speedup] = psnr(case.run(fewer), reference)
            case.set_noise_scheduler(own)
        for title, rule in RULES.items():
            with accelerated(case.host, rule.format(speedup)):
                found.setdefault(title, {})[speedup] = psnr(case.run(case.steps), reference)
                if report(case.host).skipped < 1 - 1.3 / speedup:
                    raise RuntimeError(
                        f"{case.name}: {rule.format(speedup)} skipped {report(case.host).skipped:.2f} only"
                    )
    return found


METHODS = ("fewer steps", "fewer steps, better solver", *RULES)


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table; each cell holds the PSNR at the three speed-ups."""
    lines = [
        "PSNR of the final state in dB at " + ", ".join(f"{s}x" for s in SPEEDUPS) + "; no calibration anywhere.",
        "",
        "| model and setting | " + " | ".join(METHODS) + " | auto loses by |",
        "|---|" + "---:|" * (len(METHODS) + 1),
    ]
    for name, found in rows.items():
        cells = [" / ".join(f"{found[m][str(s)]:.1f}" for s in SPEEDUPS) if m in found else "–" for m in METHODS]
        best = {s: max(found[m][str(s)] for m in found if m != "auto") for s in SPEEDUPS}
        loss = max(best[s] - found["auto"][str(s)] for s in SPEEDUPS)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {f'{loss:.1f}' if loss > 0 else '–'} |")
    return "\n".join([*lines, "", *wins(rows)]) + "\n"


def wins(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return one line for each other method: in how many cases auto is ahead, and by how much on average."""
    return [
        f"- auto against {method}: ahead in {ahead} of {cases} cases, {gain:+.1f} dB on average"
        for method, ahead, cases, gain in compared(rows)
    ]


def compared(rows: dict[str, dict[str, dict[str, float]]]) -> Iterator[tuple[str, int, int, float]]:
    """Yield each other method, in how many cases auto is ahead of it, the number of cases, and the mean gain in dB."""
    for method in METHODS:
        gains = [
            found["auto"][s] - found[method][s] for found in rows.values() if method in found for s in found[method]
        ]
        if method != "auto" and gains:
            yield method, sum(gain > 0 for gain in gains), len(gains), float(np.mean(gains))


def front_page(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the README's table: how often auto is ahead of each other method, and by how much on average."""
    lines = ["| `auto` against | ahead in | mean gain in PSNR |", "|---|---:|---:|"]
    for method, ahead, cases, gain in compared(rows):
        name = f"`{method}`" if RULES.get(method, "").startswith(method) else method
        lines.append(f"| {name} | {ahead} of {cases} | {gain:+.1f} dB |")
    return "\n".join(lines) + "\n"


def write(rows: dict[str, dict[str, dict[str, float]]], folder: Path) -> None:
    """Write the tables of a record."""
    files.write(folder / "first-try.md", table(rows))
    files.write(folder / "first-try-front-page.md", front_page(rows))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tiny", type=Path, help="folder of benchmarks/tiny_models.py")
    args.add_argument("--again", action="store_true", help="write the tables of the record under --out anew")
    args.add_argument("--samples", type=int, default=16)
    args.add_argument("--out", type=Path, default=RESULTS)
    o = args.parse_args()
    if o.again:
        write(json.loads((o.out / "first-try.json").read_text())["rows"], o.out)
        return
    if o.tiny is None:
        args.error("--tiny is needed")
    rows: dict[str, Any] = {}
    for cases in (tiny_cases(o.tiny, o.samples), demo_cases(o.samples)):
        for case in cases:
            rows[case.name] = json.loads(json.dumps(measure(case)))
            print(table({case.name: rows[case.name]}).splitlines()[-1], flush=True)
    files.write(o.out / "first-try.json", json.dumps({"samples": o.samples, "rows": rows}, indent=1) + "\n")
    write(rows, o.out)


if __name__ == "__main__":
    main()
