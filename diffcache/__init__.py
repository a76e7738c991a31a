"""diffcache: a training-free feature-cache accelerator for diffusion models.

from diffcache import accelerate
pipe = accelerate(pipe, "schedule.safetensors")

The names of the package are imported when they are first used, so that the command line starts without torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from diffcache import moved

if TYPE_CHECKING:
    from diffcache.api import accelerate, accelerated, report, restore
    from diffcache.documents.budget import Budget
    from diffcache.documents.profile import Profile
    from diffcache.documents.schedule import CacheSchedule
    from diffcache.documents.schedule_set import ScheduleSet
    from diffcache.documents.token_profile import TokenProfile
    from diffcache.documents.token_schedule import TokenSchedule
    from diffcache.errors import DiffCacheError
    from diffcache.eval.evaluation import Evaluation, evaluate
    from diffcache.executor import FailedOpen
    from diffcache.host import Loop, branch, trajectory
    from diffcache.planning import plan
    from diffcache.planning.resampling import resampled
    from diffcache.profiling import measure
    from diffcache.profiling.calibration.optimizing import optimize
    from diffcache.profiling.fitting.output_fit import WeakerFit
    from diffcache.profiling.measuring.estimating import estimate
    from diffcache.profiling.recording.clock import UnsteadyTimes

_HOMES = {  # public name -> its module below ``diffcache``; the same as the imports above
    "Budget": "documents.budget",
    "CacheSchedule": "documents.schedule",
    "DiffCacheError": "errors",
    "Evaluation": "eval.evaluation",
    "FailedOpen": "executor",
    "Loop": "host",
    "Profile": "documents.profile",
    "ScheduleSet": "documents.schedule_set",
    "TokenProfile": "documents.token_profile",
    "TokenSchedule": "documents.token_schedule",
    "UnsteadyTimes": "profiling.recording.clock",
    "WeakerFit": "profiling.fitting.output_fit",
    "accelerate": "api",
    "accelerated": "api",
    "branch": "host",
    "estimate": "profiling.measuring.estimating",
    "evaluate": "eval.evaluation",
    "measure": "profiling",
    "optimize": "profiling.calibration.optimizing",
    "plan": "planning",
    "report": "api",
    "resampled": "planning.resampling",
    "restore": "api",
    "trajectory": "host",
}

__all__ = [
    "Budget",
    "CacheSchedule",
    "DiffCacheError",
    "Evaluation",
    "FailedOpen",
    "Loop",
    "Profile",
    "ScheduleSet",
    "TokenProfile",
    "TokenSchedule",
    "UnsteadyTimes",
    "WeakerFit",
    "accelerate",
    "accelerated",
    "branch",
    "estimate",
    "evaluate",
    "measure",
    "optimize",
    "plan",
    "report",
    "resampled",
    "restore",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of this package, when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name not in (None, f"{__name__}.{name}"):
                raise  # the module is there, but a module that it imports is not
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {error}") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


moved.install()
logging.getLogger("diffcache").addHandler(logging.NullHandler())

__version__ = "0.2.0"


def __dir__() -> list[str]:
    """Return the public names, and those that every module has."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))])
