"""``diffcache demo``: calibrate, plan and accelerate a trained model, and show what it cost."""

from diffcache.demo.run import Size, run_demo

__all__ = ["Size", "run_demo"]
