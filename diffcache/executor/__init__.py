"""Run a schedule: at each site and step, compute, or predict from kept outputs."""

from diffcache.executor.engine import Executor, Misfit
from diffcache.executor.notices import FailedOpen

__all__ = ["Executor", "FailedOpen", "Misfit"]
