"""The published methods that ``methods.py`` compares, and its results: one row for each method and budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcache.assets import MODELS, About
from diffcache.demo.run import STEPS

RESULTS = Path(__file__).parent / "results"
OURS = "optimize"
AUTO = "auto (diffcache, no calibration)"

# name in the table -> (scheduler's spec, correction fitted on the calibration calls)
PUBLISHED: dict[str, tuple[str, str]] = {
    "uniform reuse": ("uniform", ""),
    "SmoothCache": ("smoothcache:sites=sublayer", ""),
    "MagCache": ("magcache", ""),
    "ERTACache mask": ("ertacache", ""),
    "ERTACache": ("timestep_adjustment", "one for all channels"),
    "CacheQuant DPS": ("cachequant", ""),
    "CacheQuant DPS + DEC": ("cachequant", "per channel"),
    "LeMiCa path": ("lemica", ""),
    "MeanCache path": ("meancache", ""),
    "DPCache path": ("dpcache", ""),
    "TaylorSeer, order 1": ("taylorseer:order=1", ""),
    "TaylorSeer, order 2": ("taylorseer:order=2", ""),
    "L2P": ("l2p", ""),
    "ZEUS": ("zeus", ""),
    "BudCache": ("budcache", ""),
    "CEM": ("cem", ""),
    "CEM + TaylorSeer": ("cem:order=1", ""),
    "OTCache": ("otcache", ""),
    "Spectrum": ("spectrum", ""),
    "Spectrum, half linear": ("spectrum:blend=0.5", ""),
    "simulated plan (diffcache, no fit)": ("closed_loop", ""),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One method at one budget. ``computed``: work in the denoiser, in full steps; psnr_low_db: the worst decile."""

    method: str
    budget: float
    computed: float
    speedup: float
    psnr_db: float
    psnr_low_db: float
    ssim: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The results on one demo model at one number of steps.

    Attributes:
        model: The name of the demo model.
        steps: Steps of the full run.
        circumstances: The size, the versions and the machine.
        rows: The results.
    """

    model: str
    steps: int
    circumstances: dict[str, Any]
    rows: Sequence[Result]

    @classmethod
    def load(cls, path: Path) -> Record:
        """Return the record in a file. Files without a number of steps are of 50 steps."""
        found = json.loads(path.read_text())
        rows = [Result(**row) for row in found["rows"]]
        return cls(found["model"], found.get("steps", STEPS), found["circumstances"], rows)

    @property
    def name(self) -> str:
        """The end of the names of its files: the model, and the number of steps unless it is 50."""
        return named(self.model, self.steps)

    @property
    def about(self) -> About:
        """What the model is."""
        return MODELS[self.model]


def named(model: str, steps: int) -> str:
    """Return the end of the names of files about a demo model at a number of steps."""
    return model if steps == STEPS else f"{model}-{steps}"


def records(folder: Path) -> list[Record]:
    """Return the records in a folder by model, those of 50 steps first."""
    found = [Record.load(path) for path in folder.glob("methods-*.json")]
    return sorted(found, key=lambda one: (one.model, one.steps != STEPS, -one.steps))
