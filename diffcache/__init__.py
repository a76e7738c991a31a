"""diffcache: a training-free feature-cache accelerator for diffusion models.

    from diffcache import accelerate
    pipe = accelerate(pipe, "schedule.safetensors")
"""

from diffcache.api import accelerate, accelerated, report, restore
from diffcache.errors import DiffCacheError
from diffcache.profile import Profile
from diffcache.schedule import CacheSchedule

__all__ = [
    "CacheSchedule",
    "DiffCacheError",
    "Profile",
    "accelerate",
    "accelerated",
    "report",
    "restore",
]

__version__ = "0.1.0"
