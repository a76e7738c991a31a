"""Run the steps of the demo: record, plan, save and evaluate."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from diffcache import host, planning
from diffcache.assets import About, DemoModel, load
from diffcache.assets.models import SIZE
from diffcache.demo import sheet
from diffcache.documents import files
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule
from diffcache.eval import metrics
from diffcache.eval.evaluation import Evaluation, evaluate, write
from diffcache.eval.methods import Method, ours
from diffcache.profiling import Calibration

STEPS = 50
COMPARED = 4  # pictures in a timed call
BEST_PUBLISHED = {  # at 8 of 50 steps, in benchmarks/results/summary-<model>.md
    "flux": ("TaylorSeer", "taylorseer:order=1"),
    "flux-guided": ("CacheQuant DPS", "cachequant"),
    "dit": ("MeanCache", "meancache"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The amount of work in the demo.

    Attributes:
        budgets: Numbers of computed steps, out of 50.
        calibration: Number of samples for calibration.
        held_out: Number of samples for the comparison.
        fits: Number of fits of the search over masks, for each budget. A count, so that slow machines find the same
            schedules.
        repeats: Number of timed runs of each method, for benchmarks.
    """

    budgets: tuple[int, ...] = (17, 12, 8)
    calibration: int = 16
    held_out: int = 16
    fits: int = 8
    repeats: int = 3

    @classmethod
    def quick(cls) -> Size:
        """Return the size for a quick run."""
        return cls(budgets=(8,), calibration=8, held_out=8, fits=2, repeats=1)


def run_demo(name: str, out: Path, size: Size) -> Evaluation:
    """Calibrate on some subjects, compare on others, and write everything to the folder ``out``."""
    model = load(name)
    for metric in host.traits(model.pipe).metrics:
        metrics.check(metric)  # raises for missing packages before minutes of work
    files.make_folder(out)
    fitted, shown = split(model, size)
    schedules = {}
    with tqdm(total=len(size.budgets) + 1, desc=f"measure {size.calibration} pictures", unit="part") as bar:
        calibration = Calibration.record(model.pipe, [model.call(*part, steps=STEPS) for part in batches(fitted)])
        bar.update()
        for budget in sorted(size.budgets):  # a larger budget starts from the result of a smaller one
            bar.set_description(f"plan {budget} of {STEPS} steps")
            schedules[budget] = calibration.schedule(budget, fits=size.fits)
            schedules[budget].save(out / f"{name}-{STEPS}-{budget}.safetensors")
            bar.update()
    return compare(model, {budget: schedules[budget] for budget in size.budgets}, calibration.profile(), shown, out)


def compare(
    model: DemoModel,
    schedules: Mapping[int, CacheSchedule],
    profile: Profile,
    shown: tuple[list[str], list[int]],
    out: Path,
) -> Evaluation:
    """Evaluate schedules of the demo on held-out subjects and seeds, and draw the sheet of pictures.

    Args:
        model: The demo model.
        schedules: Number of computed steps -> schedule.
        profile: The profile of the calibration. The best published method is planned from it for the fewest steps.
        shown: The subjects and seeds.
        out: The folder.
    """
    fewest = min(schedules)
    found = evaluate(
        model.pipe,
        {f"diffcache, {budget} computed": schedule for budget, schedule in schedules.items()},
        [model.call(*part, steps=STEPS) for part in batches(shown, COMPARED)],
        extra=[published(model.name, profile, fewest)],
        profile=profile,
        out=out,
        title=title(model.about),
    )
    if not isinstance(found, Evaluation):
        raise TypeError(type(found).__name__)
    for sample, subject in zip(found.record["samples"], shown[0], strict=True):
        sample["prompt"] = subject  # the calls hold embeddings or numbers of classes, which readers do not know
    found = write(found.record, found.folder)
    sheet.draw(found.record, found.folder, fewest, out / "pictures.png")
    return found


def title(about: About) -> str:
    """Return the title of a demo's report."""
    return f"{about.task.capitalize()}, {SIZE} px: {about.network}, {about.guidance_words}"


def published(name: str, profile: Profile, computed: int) -> Method:
    """Return the published method that is best on a demo model at few steps, planned from a profile."""
    method_name, spec = BEST_PUBLISHED[name]
    method = ours(f"{method_name}, {computed} computed", planning.plan(profile, spec, computed))
    return replace(method, kind="peer")


def split(model: DemoModel, size: Size) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """Return (subjects, seeds) for calibration and for comparison.

    No seed is in both, and no subject if there are enough.
    """
    wanted = size.calibration + size.held_out
    order = np.random.default_rng(7).permutation(len(model.subjects))
    names = [model.subjects[order[i % len(order)]] for i in range(wanted)]
    seeds = list(range(1000, 1000 + wanted))
    cut = size.calibration
    return (names[:cut], seeds[:cut]), (names[cut:], seeds[cut:])


def batches(samples: tuple[list[str], list[int]], size: int = 8) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the subjects and seeds in batches of ``size``."""
    for i in range(0, len(samples[0]), size):
        yield samples[0][i : i + size], samples[1][i : i + size]


def circumstances(size: Size) -> dict[str, Any]:
    """Return the size, the versions and the machine, which readers need to judge the results."""
    return {"size": asdict(size), **machine()}


def machine() -> dict[str, Any]:
    """Return the versions of packages and the kind of machine."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
