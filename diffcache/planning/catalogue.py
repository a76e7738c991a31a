"""List the schedulers with their sources, options and demo results, for ``diffcache plan --list``."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from diffcache import registry, schedulers

DEMO_FILE, DEMO_STEPS = "demo_psnr.json", "12 of 50 steps computed"  # measured by benchmarks/methods.py


@dataclass(frozen=True, slots=True)
class Scheduler:
    """One line of ``diffcache plan --list``.

    Attributes:
        name: The name of its file, by which users select it.
        summary: The first line of its file.
        source: The paper, and the repository that it was compared with.
        options: Name -> default.
        needs: The tables that a profile must hold beyond those of the model's outputs.
        group: One of ``schedulers.GROUPS``.
        demo_db: Demo model -> PSNR of the decoded picture in dB, at ``DEMO_STEPS``. Models that the method was not
            measured on are left out.
    """

    name: str
    summary: str
    source: str
    options: dict[str, Any]
    needs: str = ""
    group: str = "published methods"
    demo_db: dict[str, float] = field(default_factory=dict)


def available() -> tuple[Scheduler, ...]:
    """Return every scheduler that plans from a profile, by group and name."""
    found = [_described(name, _measured()) for name in schedulers.having("plan")]
    return tuple(sorted(found, key=lambda one: (schedulers.GROUPS.index(one.group), one.name)))


@functools.cache
def _measured() -> dict[str, dict[str, float]]:
    """Return demo model -> scheduler -> PSNR in dB."""
    text = resources.files(schedulers).joinpath(DEMO_FILE).read_text()
    found: dict[str, dict[str, float]] = json.loads(text)["psnr_db"]
    return found


def _described(name: str, measured: dict[str, dict[str, float]]) -> Scheduler:
    """Describe the scheduler in the file ``name``."""
    module = registry.load(schedulers.__name__, name)
    parameters = inspect.signature(module.plan).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    summary = (module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    group = getattr(module, "GROUP", "published methods")
    demo_db = {model: decibels[name] for model, decibels in measured.items() if name in decibels}
    return Scheduler(name, summary, module.SOURCE, options, module.NEEDS, group, demo_db)
