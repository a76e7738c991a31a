"""``diffcache demo``: calibrate, plan and accelerate a trained model, and show what it cost."""

from diffcache.demo.run import Plan, run_demo

__all__ = ["Plan", "run_demo"]
