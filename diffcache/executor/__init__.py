"""Run a schedule: at each site and step, compute, or predict from kept outputs."""

from diffcache.executor.cost import Estimate
from diffcache.executor.engine import Executor, Misfit
from diffcache.executor.notices import FailedOpen, Notice
from diffcache.executor.report import Report, Row
from diffcache.executor.store import Anchor, Output, Store

__all__ = ["Anchor", "Estimate", "Executor", "FailedOpen", "Misfit", "Notice", "Output", "Report", "Row", "Store"]
