"""One decision per site and step: compute, or predict from what was kept."""

from diffcache.executor.engine import Executor, Misfit
from diffcache.executor.notices import FailedOpen

__all__ = ["Executor", "FailedOpen", "Misfit"]
