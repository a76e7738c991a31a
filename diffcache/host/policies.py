"""Recognise diffusion policies by their structure: the network, the method that is the loop, and what steps it.

No policy class is imported. A family is a set of attribute paths; a policy that has all of them belongs to it.
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

COMPILED = "_torchdynamo_orig_callable"  # attribute of methods that torch.compile has compiled


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of policy, described by attribute paths that begin at the policy.

    Attributes:
        network: The denoiser. After a colon follows the method of it that is called at every step, if that is not
            ``forward``.
        loop: The method whose call is one run of the loop.
        call: The method that a robot calls.
        steps: The number of steps that a run takes.
        scheduler: The diffusers noise scheduler that the loop steps; "" if forwards are counted.
        evaluations: Returns the number of forwards in each step of a policy, if forwards are counted.
        blocks: The path from the owner of the method ``network`` to the list of its blocks. "" if the list is directly
            under the owner, or if the blocks are called in parts, so that none can be skipped.
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
    """A method that has its blocks deeper in its owner than ``find_sites`` searches, among those of other networks."""

    __slots__ = ("blocks",)

    def __init__(self, owner: Any, name: str, blocks: str) -> None:
        super().__init__(owner, name)
        self.blocks = blocks

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the list of blocks with its path, for ``find_sites``.

        Yield nothing if the method is compiled as one graph.
        """
        method = getattr(self.of(), self.name)
        while not hasattr(method, COMPILED) and hasattr(method, "__wrapped__"):  # diffcache's layers
            method = method.__wrapped__
        if not hasattr(method, COMPILED):
            yield self.blocks, _at(self.of(), self.blocks)


class PolicyLoop(Loop):
    """The loop inside of a policy.

    The registered loop does not keep the policy alive; the copies that ``kept`` returns do.

    Args:
        policy: The policy.
        family: The family that it belongs to.
    """

    name = "model"

    def __init__(self, policy: Any, family: Family) -> None:
        self._policy: Callable[[], Any] = weakref.ref(policy)
        self.family = family
        self._path, _, self._name = family.network.partition(":")
        self._method: BoundMethod | None = None
        self._shared_clock, self._thread_state = Clock(), threading.local()

    @property
    def policy(self) -> Any:
        """Return the policy, or None once it is gone."""
        return self._policy()

    @property
    def shown(self) -> Any:
        """Return the policy, which users pass."""
        return self.policy

    @property
    def network(self) -> Any:
        """Return the denoiser: a module, or the method that is called at every step."""
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
        """Return the noise scheduler of the policy, or a ``Clock`` if forwards are counted."""
        if self.family.scheduler:
            return _at(self.policy, self.family.scheduler)
        self._shared_clock.config = {"evaluations of a step": self.evaluations}
        return self._shared_clock

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        _set(self.policy, self.family.scheduler, value)

    @property
    def evaluations(self) -> int:
        """Return the number of evaluations of the network in each of the policy's steps."""
        return self.family.evaluations(self.policy)

    @property
    def steps(self) -> int:
        """Return the number of steps of a run as schedules count them, which are evaluations of the network."""
        return int(_at(self.policy, self.family.steps)) * self.evaluations

    @contextlib.contextmanager
    def of_steps(self, steps: int) -> Iterator[None]:
        """Make the policy take ``steps`` evaluations, rounded up to whole steps, within the ``with`` block."""
        before = _at(self.policy, self.family.steps)
        _set(self.policy, self.family.steps, math.ceil(steps / self.evaluations))
        try:
            yield
        finally:
            _set(self.policy, self.family.steps, before)

    def kept(self) -> PolicyLoop:
        """Return a copy of this loop that keeps the policy alive."""
        policy, twin = self.policy, copy.copy(self)
        twin._policy = lambda: policy
        for layered in ("begin", "end"):  # the layers on this loop
            twin.__dict__.pop(layered, None)
        return twin

    @property
    def registered(self) -> Loop:
        """Return the loop that is registered for the policy."""
        return LOOPS[self.policy]

    @property
    def runs(self) -> tuple[Any, str]:
        """Return the object and the name of the method whose call is the loop."""
        path, _, name = self.family.loop.rpartition(".")
        return (_at(self.policy, path) if path else self.policy), name

    def run(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the method whose call is the loop, and call ``begin`` and ``end`` around it.

        If several watchers layer the method, only the outermost layer calls them.
        """
        registered = self.registered
        if registered.inside:
            return inner(*args, **kwargs)
        result, broken = None, True
        try:
            registered.begin(None if self.family.scheduler else self._grid(args, kwargs))
            result = inner(*args, **kwargs)
            broken = False
        finally:
            # A copy, because SmolVLA changes joints in place in the tensor that the loop returned.
            registered.end(pytree.tree_map_only(Tensor, torch.clone, result), broken)
        return result

    def _grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the names of the steps of a run with these arguments, [T]. The network may be given other times."""
        asked = inspect.signature(getattr(*self.runs)).bind_partial(*args, **kwargs).arguments.get("num_steps")
        steps = self.steps if asked is None else int(asked) * self.evaluations
        return torch.linspace(1.0, 0.0, steps + 1)[:-1]

    def sample(self, *, num_inference_steps: int | None = None, **arguments: Any) -> Any:
        """Call the policy for actions.

        Args:
            num_inference_steps: The number of evaluations in this call. None: as many as the policy is set to.
            arguments: Arguments of the policy's method. The policy gets copies of tensors, which it may change.
        """
        given = pytree.tree_map_only(Tensor, torch.clone, arguments)
        with self.of_steps(self.steps if num_inference_steps is None else num_inference_steps), self._observed(given):
            return getattr(self.policy, self.family.call)(**given)

    @contextlib.contextmanager
    def _observed(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Fill the observation queues of a policy of lerobot from ``arguments`` within the ``with`` block.

        Such policies read queues that ``select_action`` fills step by step. Other policies are left as they are.
        """
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
    """Return the loop that is registered for a policy; None for an object of no known family."""
    policy = getattr(policy, "_orig_mod", policy)  # the module that torch.compile wrapped
    if isinstance(policy, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        policy = policy.module
    if not isinstance(policy, nn.Module):
        return None
    known = LOOPS.get(policy)
    if isinstance(known, PolicyLoop):
        return known
    for family in FAMILIES.values():
        if all(_there(policy, path) for path in _paths(family)):
            # Errors show the class of the host, so the class of the loop has the name of the policy's class.
            kind = type(type(policy).__name__, (PolicyLoop,), {})
            loop: PolicyLoop = kind(policy, family)
            LOOPS[policy] = loop
            return loop
    return None


def _paths(family: Family) -> list[str]:
    """Return the attribute paths that a policy of a family must have."""
    paths = family.network.replace(":", "."), family.loop, family.call, family.steps, family.scheduler
    return [path for path in paths if path]


def _at(policy: Any, path: str) -> Any:
    """Return the attribute of a policy at a dotted path."""
    return functools.reduce(getattr, path.split("."), policy)


def _set(policy: Any, path: str, value: Any) -> None:
    """Set the attribute of a policy at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(_at(policy, owner) if owner else policy, name, value)


def _there(policy: Any, path: str) -> bool:
    """Return whether a policy has an attribute other than None at a dotted path."""
    try:
        return _at(policy, path) is not None
    except AttributeError:
        return False
