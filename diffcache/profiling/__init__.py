"""Run and measure; fit what was measured."""

from diffcache.profiling.optimize import Calibration, optimize

__all__ = ["Calibration", "optimize"]
