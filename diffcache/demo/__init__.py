"""``diffcache demo``: calibrate, plan and accelerate a trained model, and evaluate the result."""

from diffcache.demo.run import Size, run_demo
from diffcache.demo.terminal import table

__all__ = ["Size", "run_demo", "table"]
