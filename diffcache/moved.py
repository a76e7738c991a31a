"""Errors for modules that have moved: an import of the old name raises one that states the new name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {  # below ``diffcache``: old name -> new name
    "adapters": "host.structure",
    "budget": "documents.budget",
    "channels": "host.channels",
    "correction": "profiling.calibration.correction",
    "estimates": "executor.cost",
    "eval.evaluating": "eval.evaluation",
    "eval.needs": "eval.requirements",
    "eval.parts": "eval.saved_parts",
    "eval.running": "eval.runner",
    "eval.sets": "eval.set_distances",
    "eval.solvers": "eval.noise_schedulers",
    "eval.sound": "eval.plausible",
    "eval.watch": "eval.timed_run",
    "executor.arounds": "executor.wrappers",
    "executor.decide": "executor.site",
    "executor.grid": "executor.noise_levels",
    "executor.guess": "executor.prediction",
    "executor.online": "executor.decider",
    "executor.placing": "executor.attach",
    "executor.run": "executor.engine",
    "executor.streams": "executor.pairing",
    "host.facts": "host.inspection",
    "host.loop": "host.watcher",
    "host.loops": "host.own_loops",
    "host.run": "host.loop_run",
    "levels": "host.levels",
    "optimizing": "profiling.calibration.optimizing",
    "plots": "planning.plots",
    "predictors": "executor.equation",
    "profile": "documents.profile",
    "profiling.circumstances": "profiling.replay.run_facts",
    "profiling.clock": "profiling.recording.clock",
    "profiling.costs": "profiling.measuring.costs",
    "profiling.dynamics": "profiling.fitting.dynamics",
    "profiling.findings": "profiling.measuring.partial_profile",
    "profiling.fit": "profiling.fitting.fit",
    "profiling.influence": "profiling.measuring.influence",
    "profiling.keeping": "profiling.recording.format_costs",
    "profiling.measure": "profiling.measuring.measure",
    "profiling.observe": "profiling.recording.observe",
    "profiling.output_fit": "profiling.fitting.output_fit",
    "profiling.places": "profiling.recording.measured_sites",
    "profiling.promise": "profiling.fitting.promise",
    "profiling.record": "profiling.recording.record",
    "profiling.recorded": "profiling.measuring.call_measurement",
    "profiling.resume": "profiling.measuring.resume",
    "profiling.search": "profiling.calibration.search",
    "profiling.shards": "profiling.recording.shards",
    "profiling.slopes": "profiling.replay.input_share",
    "profiling.sound": "profiling.measuring.plausible",
    "profiling.tables": "profiling.measuring.tables",
    "profiling.warp": "profiling.replay.warp",
    "reports": "executor.report",
    "resampling": "planning.resampling",
    "routers_file": "profiling.router_file",
    "schedule": "documents.schedule",
    "sites": "documents.sites",
    "store": "executor.store",
}


class MovedLoader(Loader):
    """Raises an error that states the new name when the old module is imported."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Raise ModuleNotFoundError."""
        name = spec.name.partition(".")[2]
        raise ModuleNotFoundError(f"diffcache.{name} is now diffcache.{MOVED[name]}. Import that.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: ``create_module`` makes no module."""


class MovedFinder(MetaPathFinder):
    """Finds modules that have moved. Python asks it last, for modules that no other finder has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec with a loader that raises the error, if ``fullname`` has moved, else None."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, MovedLoader()) if package == "diffcache" and name in MOVED else None


def install() -> None:
    """Add the finder, once."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
