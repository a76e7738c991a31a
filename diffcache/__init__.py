"""diffcache: a training-free feature-cache accelerator for diffusion models.

from diffcache import accelerate
pipe = accelerate(pipe, "schedule.safetensors")
"""

from diffcache.api import accelerate, accelerated, estimate, report, restore
from diffcache.budget import Budget
from diffcache.errors import DiffCacheError
from diffcache.eval.evaluating import Evaluation, evaluate
from diffcache.host import Loop, trajectory
from diffcache.optimizing import optimize
from diffcache.planning import plan
from diffcache.profile import Profile
from diffcache.profiling import measure
from diffcache.resampling import resampled
from diffcache.schedule import CacheSchedule

__all__ = [
    "Budget",
    "CacheSchedule",
    "DiffCacheError",
    "Evaluation",
    "Loop",
    "Profile",
    "accelerate",
    "accelerated",
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

__version__ = "0.1.0"
