"""Diffusion policies, known by how they are built: where the network is, which method is the loop, who steps.

No class of theirs is imported. A family is a few paths from the policy; one that has them all belongs to it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcache.host.own_loops import LOOPS, Clock, Loop
from diffcache.patch import BoundMethod

COMPILED = "_torchdynamo_orig_callable"  # what torch.compile makes of a method has this


@dataclass(frozen=True, slots=True)
class Family:
    """Paths from the policy.

    network      the denoiser; after a colon, the method of it that is called at every step, where that is not forward
    loop         the method whose call is one run of the loop
    call         the method that a robot calls
    steps        the number of steps that a run takes
    scheduler    the noise scheduler that the loop steps, from diffusers; "": forwards are counted
    evaluations  how many forwards a step has then
    blocks       where a network that is a method has the list of its blocks, from the method's owner on; "": right
                 under it, or they are called in parts, so that none can be skipped
    """

    network: str
    loop: str
    call: str
    steps: str
    scheduler: str = ""
    evaluations: Callable[[Any], int] = lambda policy: 1
    blocks: str = ""


FAMILIES = {
    "diffusion_policy": Family(
        "model", "conditional_sample", "predict_action", "num_inference_steps", "noise_scheduler"
    ),
    "lerobot diffusion": Family(
        "diffusion.unet",
        "diffusion.conditional_sample",
        "predict_action_chunk",
        "diffusion.num_inference_steps",
        "diffusion.noise_scheduler",
    ),
    "lerobot multi_task_dit": Family(
        "noise_predictor",
        "objective.conditional_sample",
        "predict_action_chunk",
        "objective.num_inference_steps",
        "objective.noise_scheduler",
    ),
    "lerobot multi_task_dit, flow matching": Family(
        "noise_predictor",
        "objective.conditional_sample",
        "predict_action_chunk",
        "config.num_integration_steps",
        evaluations=lambda policy: 4 if policy.config.integration_method == "rk4" else 1,
    ),
    "pi0, pi0.5": Family(
        "model:denoise_step",
        "model.sample_actions",
        "predict_action_chunk",
        "model.config.num_inference_steps",
        blocks="paligemma_with_expert.gemma_expert.model.layers",
    ),
    "SmolVLA": Family("model:denoise_step", "model.sample_actions", "predict_action_chunk", "model.config.num_steps"),
    "GR00T": Family(
        "_groot_model.action_head.model",
        "_groot_model.action_head.get_action_with_features",
        "predict_action_chunk",
        "_groot_model.action_head.num_inference_timesteps",
    ),
}


class Expert(BoundMethod):
    """A method whose owner has its blocks deeper down than structure is looked for, among those of other networks."""

    __slots__ = ("blocks",)

    def __init__(self, owner: Any, name: str, blocks: str) -> None:
        super().__init__(owner, name)
        self.blocks = blocks

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """What is looked at for sites, by its path: nothing inside of what is compiled as one graph."""
        method = getattr(self.of(), self.name)
        while not hasattr(method, COMPILED) and hasattr(method, "__wrapped__"):  # layers of ours
            method = method.__wrapped__
        if not hasattr(method, COMPILED):
            yield self.blocks, _at(self.of(), self.blocks)


class PolicyLoop(Loop):
    """The loop inside of a policy. The one that stands for it does not keep it alive; ``kept`` ones do."""

    name = "model"

    def __init__(self, policy: Any, family: Family) -> None:
        self._policy: Callable[[], Any] = weakref.ref(policy)
        self.family = family
        self._path, _, self._name = family.network.partition(":")
        self._method: BoundMethod | None = None
        self._clock, self._thread = Clock(), threading.local()

    @property
    def policy(self) -> Any:
        return self._policy()

    @property
    def network(self) -> Any:
        owner = _at(self.policy, self._path)
        if not self._name:
            return owner
        if self._method is None or self._method.of() is not owner:
            blocks = self.family.blocks
            found = blocks and _there(owner, blocks)
            self._method = Expert(owner, self._name, blocks) if found else BoundMethod(owner, self._name)
        return self._method

    @property
    def scheduler(self) -> Any:
        if self.family.scheduler:
            return _at(self.policy, self.family.scheduler)
        self._clock.config = {"evaluations of a step": self.evaluations}
        return self._clock

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        _set(self.policy, self.family.scheduler, value)

    @property
    def evaluations(self) -> int:
        """Of the network, in each of the policy's steps."""
        return self.family.evaluations(self.policy)

    @property
    def steps(self) -> int:
        """Of a run, as schedules count them: evaluations of the network."""
        return int(_at(self.policy, self.family.steps)) * self.evaluations

    @contextlib.contextmanager
    def of_steps(self, steps: int) -> Iterator[None]:
        """Make the policy take ``steps`` evaluations, rounded up to whole steps, while the block lasts."""
        before = _at(self.policy, self.family.steps)
        _set(self.policy, self.family.steps, math.ceil(steps / self.evaluations))
        try:
            yield
        finally:
            _set(self.policy, self.family.steps, before)

    def kept(self) -> PolicyLoop:
        """The same, for as long as somebody works with it and the policy may be nobody else's."""
        policy, twin = self.policy, copy.copy(self)
        twin._policy = lambda: policy
        for layered in ("begin", "end"):  # what is layered on this one
            twin.__dict__.pop(layered, None)
        return twin

    @property
    def registered(self) -> Loop:
        return LOOPS[self.policy]

    @property
    def runs(self) -> tuple[Any, str]:
        """The object and the name of the method whose call is the loop."""
        path, _, name = self.family.loop.rpartition(".")
        return (_at(self.policy, path) if path else self.policy), name

    def run(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """To be layered on that method. Of several that watch, the outermost tells all."""
        registered = self.registered
        if registered.inside:
            return inner(*args, **kwargs)
        result, broken = None, True
        try:
            registered.begin(None if self.family.scheduler else self._grid(args, kwargs))
            result = inner(*args, **kwargs)
            broken = False
        finally:
            # A copy: SmolVLA turns joints around in the very tensor that the loop returned.
            registered.end(pytree.tree_map_only(Tensor, torch.clone, result), broken)
        return result

    def _grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Names of the steps of a run with these arguments: what is passed as time may differ."""
        asked = inspect.signature(getattr(*self.runs)).bind_partial(*args, **kwargs).arguments.get("num_steps")
        steps = self.steps if asked is None else int(asked) * self.evaluations
        return torch.linspace(1.0, 0.0, steps + 1)[:-1]

    def sample(self, *, num_inference_steps: int | None = None, **arguments: Any) -> Any:
        """Ask the policy; ``num_inference_steps``: for this once. It is given copies, into which it may write."""
        given = pytree.tree_map_only(Tensor, torch.clone, arguments)
        with self.of_steps(self.steps if num_inference_steps is None else num_inference_steps), self._observed(given):
            return getattr(self.policy, self.family.call)(**given)

    @contextlib.contextmanager
    def _observed(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Policies of lerobot look at queues of their own, which ``select_action`` fills step by step: here they hold
        the observations that are asked about."""
        queues, batch = getattr(self.policy, "_queues", None), arguments.get("batch")
        if not isinstance(queues, dict) or not isinstance(batch, Mapping):
            yield
            return
        self.policy._queues = {
            name: deque(batch[name].unbind(1) if name in batch else (), maxlen=queue.maxlen)
            for name, queue in queues.items()
        }
        try:
            yield
        finally:
            self.policy._queues = queues


def policy_loop(policy: Any) -> PolicyLoop | None:
    """The loop that stands for what is built like a policy of a known family, else None."""
    policy = getattr(policy, "_orig_mod", policy)  # what torch.compile wrapped
    if isinstance(policy, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        policy = policy.module
    if not isinstance(policy, nn.Module):
        return None
    known = LOOPS.get(policy)
    if isinstance(known, PolicyLoop):
        return known
    for family in FAMILIES.values():
        if all(_there(policy, path) for path in _paths(family)):
            # Errors name the class of what was given, so the loop carries that name.
            kind = type(type(policy).__name__, (PolicyLoop,), {})
            loop: PolicyLoop = kind(policy, family)
            LOOPS[policy] = loop
            return loop
    return None


def _paths(family: Family) -> list[str]:
    paths = family.network.replace(":", "."), family.loop, family.call, family.steps, family.scheduler
    return [path for path in paths if path]


def _at(policy: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), policy)


def _set(policy: Any, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    setattr(_at(policy, owner) if owner else policy, name, value)


def _there(policy: Any, path: str) -> bool:
    try:
        return _at(policy, path) is not None
    except AttributeError:
        return False
