"""Run and measure; fit what was measured."""

from diffcache.profiling.calibration import Calibration
from diffcache.profiling.measure import measure

__all__ = ["Calibration", "measure"]
