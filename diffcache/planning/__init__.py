"""Make schedules from profiles and budgets, and compare and draw them. No network is called."""

from diffcache.planning.catalogue import DEMO_FILE, DEMO_STEPS, Scheduler, available
from diffcache.planning.planner import (
    Compared,
    cache_bytes,
    check_scheduler,
    check_store,
    compare,
    document,
    expected,
    plan,
    steps_for_speedup,
)
from diffcache.planning.token_planner import TokenPlan, token_plans

__all__ = [
    "DEMO_FILE",
    "DEMO_STEPS",
    "Compared",
    "Scheduler",
    "TokenPlan",
    "available",
    "cache_bytes",
    "check_scheduler",
    "check_store",
    "compare",
    "document",
    "expected",
    "plan",
    "steps_for_speedup",
    "token_plans",
]
