"""One decision per site and step: compute, or predict from what was kept."""

from diffcache.executor.run import Executor, FailedOpen

__all__ = ["Executor", "FailedOpen"]
