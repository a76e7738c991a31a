"""diffcache: a training-free feature-cache accelerator for diffusion models.

from diffcache import accelerate
pipe = accelerate(pipe, "schedule.safetensors")
"""

from diffcache.api import accelerate, accelerated, estimate, report, restore
from diffcache.errors import DiffCacheError
from diffcache.profile import Profile
from diffcache.profiling import optimize
from diffcache.schedule import CacheSchedule

__all__ = [
    "CacheSchedule",
    "DiffCacheError",
    "Profile",
    "accelerate",
    "accelerated",
    "estimate",
    "optimize",
    "report",
    "restore",
]

__version__ = "0.1.0"
