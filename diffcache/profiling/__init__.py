"""Run and measure; fit what was measured."""

from diffcache.profiling.measure import measure
from diffcache.profiling.optimize import Calibration, optimize

__all__ = ["Calibration", "measure", "optimize"]
