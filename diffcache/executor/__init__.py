"""One decision per site and step: compute, or predict from what was kept."""

from diffcache.executor.notices import FailedOpen
from diffcache.executor.run import Executor, Misfit

__all__ = ["Executor", "FailedOpen", "Misfit"]
