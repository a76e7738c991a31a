"""Turn recorded runs into schedules: search masks, fit each, and choose."""

from diffcache.profiling.calibration.correction import correct

__all__ = ["correct"]
