"""Hosts: the objects that run a sampling loop around a network.

No other package depends on how pipelines, policies and loops behave. ``kinds`` has one file for each kind of host. A
``LoopWatcher`` passes the events of a loop to a ``LoopObserver``: the loop begins, goes back, ends. No
``cache_context`` is needed, because most pipelines open none. All wrappers lie on objects, never on classes.

If two pipelines share a denoiser, a forward belongs to the pipeline whose loop is open.
"""

from diffcache.host.arguments import GRIDS, Parameters, is_count, parameters_of, planned
from diffcache.host.branches import Forward, branch
from diffcache.host.call_values import MOST_STEPS, check_values, generators
from diffcache.host.calls import (
    arguments_of,
    arguments_of_class,
    calls_of,
    check_call,
    check_calls,
    check_names,
    check_same_steps,
    iterations,
    steps_asked,
)
from diffcache.host.dispatch import (
    adopted,
    demand_one_process,
    denoisers,
    guidance_scales,
    guidance_values,
    in_parts,
    noise_scheduler,
    parts,
    traits,
)
from diffcache.host.forwards import is_compiled
from diffcache.host.guard import demand_full_run, demand_no_other_cache, demand_ready
from diffcache.host.guidance import is_guided
from diffcache.host.identity import digest_of, digest_of_call, identity
from diffcache.host.inspection import (
    batches_guidance,
    class_name,
    conditions_of,
    config_digest,
    configurations,
    guiders,
    host_name,
    looping_blocks,
    main_input,
    main_of,
    other_settings,
    parameters,
    prediction_type,
    time_of,
    unwrapped,
)
from diffcache.host.kinds import Kind, LoopWatch, kind_of
from diffcache.host.language_models import language_model_of, mask_id_of
from diffcache.host.levels import CannotFollow, noise_shares
from diffcache.host.loop_run import LoopRun
from diffcache.host.own_loops import MARK, Clock, Loop, trajectory
from diffcache.host.policies import PolicyLoop
from diffcache.host.propagation import propagation
from diffcache.host.recognition import network_facts
from diffcache.host.structure import find_sites
from diffcache.host.traits import Traits
from diffcache.host.watcher import LoopObserver, LoopWatcher
from diffcache.host.wrapping import Wrapping

__all__ = [
    "GRIDS",
    "MARK",
    "MOST_STEPS",
    "CannotFollow",
    "Clock",
    "Forward",
    "Kind",
    "Loop",
    "LoopObserver",
    "LoopRun",
    "LoopWatch",
    "LoopWatcher",
    "Parameters",
    "PolicyLoop",
    "Traits",
    "Wrapping",
    "adopted",
    "arguments_of",
    "arguments_of_class",
    "batches_guidance",
    "branch",
    "calls_of",
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
    "find_sites",
    "generators",
    "guidance_scales",
    "guidance_values",
    "guiders",
    "host_name",
    "identity",
    "in_parts",
    "is_compiled",
    "is_count",
    "is_guided",
    "iterations",
    "kind_of",
    "language_model_of",
    "looping_blocks",
    "main_input",
    "main_of",
    "mask_id_of",
    "network_facts",
    "noise_scheduler",
    "noise_shares",
    "other_settings",
    "parameters",
    "parameters_of",
    "parts",
    "planned",
    "prediction_type",
    "propagation",
    "steps_asked",
    "time_of",
    "traits",
    "trajectory",
    "unwrapped",
]
