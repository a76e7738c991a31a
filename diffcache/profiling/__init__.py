"""Record and measure full runs, and fit schedules to them."""

from diffcache.profiling.calibration.calibration import Calibration
from diffcache.profiling.calibration.token_search import DecodingCalibration
from diffcache.profiling.measuring.measure import measure

__all__ = ["Calibration", "DecodingCalibration", "measure"]
