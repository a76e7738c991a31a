"""Run a recorded sampling loop without its pipeline: any step, from any state, computed or predicted."""

from diffcache.profiling.replay.replay import NotReplayable, Replay

__all__ = ["NotReplayable", "Replay"]
