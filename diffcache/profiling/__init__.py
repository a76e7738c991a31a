"""Run and measure; fit what was measured."""

from diffcache.profiling.calibration.calibration import Calibration
from diffcache.profiling.measuring.measure import measure

__all__ = ["Calibration", "measure"]
