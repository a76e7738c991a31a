"""The published methods that ``methods.py`` compares, and its results: one row for each method and budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffcache.assets import MODELS, About
from diffcache.demo.run import STEPS
from diffcache.documents import files

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

# name in the table -> (key of trained_solvers.SOLVERS, training time as a multiple of that of `optimize`)
TRAINED: dict[str, tuple[str, int]] = {
    "DyWeight, trained as long as optimize": ("dyweight", 1),
    "DyWeight, trained ten times as long": ("dyweight", 10),
    "S4S-Alt, trained as long as optimize": ("s4s", 1),
    "S4S-Alt, trained ten times as long": ("s4s", 10),
}
SEARCHED = "BudCache, searched on real runs"
COSTLY = (*TRAINED, SEARCHED)
FEWER = "fewer steps"


def selectable() -> list[str]:
    """Return the names that ``methods.py --only`` takes."""
    return [FEWER, AUTO, *PUBLISHED, *COSTLY, OURS]


@dataclass(frozen=True, slots=True)
class Result:
    """One method at one budget.

    Attributes:
        method: The name of the row.
        budget: The computed steps that were asked for.
        computed: The work in the denoiser, in full steps.
        speedup: Of the sampling loop, compared with the full run of the same process.
        psnr_db: The mean over pictures.
        psnr_low_db: The worst decile.
        ssim: The mean over pictures.
        note: What the row cost, or the setting of a package.
        ran_on: The versions and the machine, if they differ from those of the record.
    """

    method: str
    budget: float
    computed: float
    speedup: float
    psnr_db: float
    psnr_low_db: float
    ssim: float
    note: str = ""
    ran_on: dict[str, Any] | None = None

    @property
    def setting(self) -> str:
        """The setting of another package, which the note of its rows holds. Other rows have none."""
        return self.note if ": " in self.method else ""

    def row(self) -> dict[str, Any]:
        """Return the row of a record. ``ran_on`` is left out where it is None."""
        return {name: value for name, value in asdict(self).items() if name != "ran_on" or value is not None}


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

    def save(self, folder: Path) -> None:
        """Write the file of the record in a folder."""
        rows = [result.row() for result in self.rows]
        found = {"model": self.model, "steps": self.steps, "circumstances": self.circumstances, "rows": rows}
        files.write(folder / f"methods-{self.name}.json", json.dumps(found, indent=2) + "\n")

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
