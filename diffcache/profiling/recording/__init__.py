"""Run a pipeline in full and record its sampling loop."""

from diffcache.profiling.recording.clock import loop_clock, wait
from diffcache.profiling.recording.generators import demand_own_generators, with_copied_generators
from diffcache.profiling.recording.measured_sites import granularities
from diffcache.profiling.recording.record import LoopStep, Trajectory
from diffcache.profiling.recording.shards import all_shares
from diffcache.profiling.recording.states import final_states, step_states

__all__ = [
    "LoopStep",
    "Trajectory",
    "all_shares",
    "demand_own_generators",
    "final_states",
    "granularities",
    "loop_clock",
    "step_states",
    "wait",
    "with_copied_generators",
]
