"""diffcache: a training-free feature-cache accelerator for diffusion models.

from diffcache import accelerate
pipe = accelerate(pipe, "schedule.safetensors")
"""

import logging

from diffcache import moved
from diffcache.api import accelerate, accelerated, estimate, report, restore
from diffcache.documents.budget import Budget
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import DiffCacheError
from diffcache.eval.evaluation import Evaluation, evaluate
from diffcache.executor import FailedOpen
from diffcache.host import Loop, branch, trajectory
from diffcache.planning import plan
from diffcache.planning.resampling import resampled
from diffcache.profiling import measure
from diffcache.profiling.calibration.optimizing import optimize
from diffcache.profiling.fitting.output_fit import WeakerFit

__all__ = [
    "Budget",
    "CacheSchedule",
    "DiffCacheError",
    "Evaluation",
    "FailedOpen",
    "Loop",
    "Profile",
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

moved.install()
logging.getLogger("diffcache").addHandler(logging.NullHandler())

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """Return the public names, and those that every module has."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))])
