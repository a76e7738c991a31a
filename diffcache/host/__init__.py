"""What a diffusers pipeline does around its denoiser: where its loop begins and ends, which step it is in.

No other package knows pipeline habits. Nothing here needs a ``cache_context``: most pipelines open none. The facts
come from three methods, layered on objects, never on classes:

* ``pipe.progress_bar`` brackets the sampling loop of all but two diffusers pipelines, in both of its forms
  (``with pipe.progress_bar(total=n)`` and ``for t in pipe.progress_bar(timesteps)``), and closes on exceptions too;
* ``scheduler.step`` of the scheduler in use, layered for the length of one loop, ends each step;
* ``pipe.maybe_free_model_hooks`` is the last thing a pipeline calls.

A pipeline that shares its denoiser with another is therefore told apart: its own loop is open, or it is not.

Loops that are no pipeline's (``loops``, ``policies``) say by themselves where they begin and end.
"""

from diffcache.host.branches import BRANCH_NAMES, Forward, branch
from diffcache.host.calls import (
    GRIDS,
    MOST_STEPS,
    arguments_of,
    arguments_of_class,
    check_call,
    check_calls,
    check_names,
    check_same_steps,
    check_values,
    generators,
    is_count,
    iterations,
    planned,
    steps_asked,
)
from diffcache.host.forwards import is_compiled
from diffcache.host.guard import demand_full_run, demand_no_other_cache, demand_ready
from diffcache.host.guidance import guidance_scales, guidance_values
from diffcache.host.identity import digest_of, digest_of_call, identity
from diffcache.host.inspection import (
    adopted,
    batches_guidance,
    class_name,
    conditions_of,
    config_digest,
    configurations,
    demand_one_process,
    denoisers,
    guiders,
    in_parts,
    looping_blocks,
    main_input,
    main_of,
    other_settings,
    parameters,
    prediction_type,
    time_of,
    unwrapped,
)
from diffcache.host.loop_state import Run
from diffcache.host.own_loops import MARK, Clock, Loop, trajectory
from diffcache.host.policies import PolicyLoop
from diffcache.host.traits import PIPELINE, Traits, traits
from diffcache.host.watcher import Host
from diffcache.host.wrapping import Wrapping

__all__ = [
    "BRANCH_NAMES",
    "GRIDS",
    "MARK",
    "MOST_STEPS",
    "PIPELINE",
    "Clock",
    "Forward",
    "Host",
    "Loop",
    "PolicyLoop",
    "Run",
    "Traits",
    "Wrapping",
    "adopted",
    "arguments_of",
    "arguments_of_class",
    "batches_guidance",
    "branch",
    "check_call",
    "check_calls",
    "check_names",
    "check_same_steps",
    "check_values",
    "class_name",
    "conditions_of",
    "config_digest",
    "configurations",
    "demand_full_run",
    "demand_no_other_cache",
    "demand_one_process",
    "demand_ready",
    "denoisers",
    "digest_of",
    "digest_of_call",
    "generators",
    "guidance_scales",
    "guidance_values",
    "guiders",
    "identity",
    "in_parts",
    "is_compiled",
    "is_count",
    "iterations",
    "looping_blocks",
    "main_input",
    "main_of",
    "other_settings",
    "parameters",
    "planned",
    "prediction_type",
    "steps_asked",
    "time_of",
    "traits",
    "trajectory",
    "unwrapped",
]
