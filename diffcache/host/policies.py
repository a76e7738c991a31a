"""Diffusion policies, known by how they are built: where the network is, which method is the loop, who steps.

No class of theirs is imported. A family is a few paths from the policy; one that has them all belongs to it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffcache.host.loops import LOOPS, Clock, Loop
from diffcache.patch import Method


@dataclass(frozen=True, slots=True)
class Family:
    """Paths from the policy.

    network    the denoiser; after a colon, the method of it that is called at every step, where that is not forward
    loop       the method whose call is one run of the loop
    call       the method that a robot calls
    scheduler  the noise scheduler that the loop steps, from diffusers
    steps      where there is none: how many forwards a run has, from the policy and the loop's own arguments
    """

    network: str
    loop: str
    call: str
    scheduler: str = ""
    steps: Callable[[Any, dict[str, Any]], int] | None = None


def _stages(policy: Any, arguments: dict[str, Any]) -> int:
    return int(policy.config.num_integration_steps) * (4 if policy.config.integration_method == "rk4" else 1)


def _asked(policy: Any, arguments: dict[str, Any]) -> int:
    config = policy.config
    planned = config.num_inference_steps if hasattr(config, "num_inference_steps") else config.num_steps
    given = arguments.get("num_steps")
    return int(planned if given is None else given)


FAMILIES = {
    "diffusion_policy": Family("model", "conditional_sample", "predict_action", "noise_scheduler"),
    "lerobot diffusion": Family(
        "diffusion.unet", "diffusion.conditional_sample", "predict_action_chunk", "diffusion.noise_scheduler"
    ),
    "lerobot multi_task_dit": Family(
        "noise_predictor", "objective.conditional_sample", "predict_action_chunk", "objective.noise_scheduler"
    ),
    "lerobot multi_task_dit, flow matching": Family(
        "noise_predictor", "objective.conditional_sample", "predict_action_chunk", steps=_stages
    ),
    "pi0, pi0.5, SmolVLA": Family("model:denoise_step", "model.sample_actions", "predict_action_chunk", steps=_asked),
    "GR00T": Family(
        "_groot_model.action_head.model",
        "_groot_model.action_head.get_action_with_features",
        "predict_action_chunk",
        steps=lambda policy, _: int(policy._groot_model.action_head.num_inference_timesteps),
    ),
}


class PolicyLoop(Loop):
    """The loop inside of a policy, whom it does not keep alive."""

    name = "model"

    def __init__(self, policy: Any, family: Family) -> None:
        self._policy, self.family = weakref.ref(policy), family
        path, _, method = family.network.partition(":")
        self._path = path
        self._method = Method(_at(policy, path), method) if method else None
        self._clock = Clock()

    @property
    def policy(self) -> Any:
        return self._policy()

    @property
    def network(self) -> Any:
        return self._method or _at(self.policy, self._path)

    @property
    def scheduler(self) -> Any:
        return _at(self.policy, self.family.scheduler) if self.family.scheduler else self._clock

    @property
    def told(self) -> Loop:
        return self

    @property
    def runs(self) -> tuple[Any, str]:
        """The object and the name of the method whose call is the loop."""
        path, _, name = self.family.loop.rpartition(".")
        return (_at(self.policy, path) if path else self.policy), name

    def run(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """To be layered on that method."""
        timesteps = None
        if self.family.steps is not None:
            steps = self.family.steps(self.policy, kwargs)
            timesteps = torch.linspace(1.0, 0.0, steps + 1)[:-1]  # names of steps: what is passed as time may differ
        self.begin(timesteps)
        result = None
        try:
            result = inner(*args, **kwargs)
        finally:
            self.end(result)
        return result

    def sample(self, **arguments: Any) -> Any:
        return getattr(self.policy, self.family.call)(**arguments)


def policy_loop(policy: Any) -> Loop | None:
    """The loop of what is built like a policy of a known family, else None. The same object for one policy always."""
    if not isinstance(policy, nn.Module):
        return None
    known = LOOPS.get(policy)
    if isinstance(known, PolicyLoop):
        return known
    for family in FAMILIES.values():
        if all(_there(policy, path) for path in _paths(family)):
            # Errors name the class of what was given, so the loop carries that name.
            kind = type(type(policy).__name__, (PolicyLoop,), {})
            loop: Loop = kind(policy, family)
            LOOPS[policy] = loop
            return loop
    return None


def _paths(family: Family) -> list[str]:
    return [family.network.replace(":", "."), family.loop, family.call, *filter(None, [family.scheduler])]


def _at(policy: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), policy)


def _there(policy: Any, path: str) -> bool:
    try:
        return _at(policy, path) is not None
    except AttributeError:
        return False
