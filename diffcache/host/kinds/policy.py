"""Diffusion policies of known families: the call of one method is the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from diffcache.errors import UnsupportedModel
from diffcache.host.arguments import STEPS, Parameters, parameters_of, with_optional
from diffcache.host.inspection import has_components, host_name
from diffcache.host.kinds._kind import LoopWatch
from diffcache.host.kinds.own_loop import OwnLoop, OwnLoopWatch
from diffcache.host.own_loops import Loop
from diffcache.host.policies import COMPILED, FAMILIES, PolicyLoop, policy_loop
from diffcache.host.traits import Traits
from diffcache.patch import Undo, layer

if TYPE_CHECKING:
    from diffcache.host.watcher import LoopWatcher


class Policy(OwnLoop):
    """A diffusion policy."""

    traits = Traits(
        returns="actions",
        metrics=("action", "state"),
        plays_episodes=True,
        steps_argument=STEPS,
        has_step_setting=True,
        swaps_scheduler=True,
        writes_arguments=True,
    )
    allowed = f"a diffusion policy ({', '.join(FAMILIES)})"
    fallback = False

    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` is built like a policy of a known family, or is the loop of one."""
        if isinstance(value, Loop):
            return isinstance(value, PolicyLoop)
        return not has_components(value) and policy_loop(value) is not None

    def adopt(self, value: Any, *, bare: bool = False) -> Any:
        """Return the loop of the policy. The registered one does not keep the policy alive; others do."""
        if isinstance(value, Loop):
            return value.registered if bare else value
        found: Any = policy_loop(value)
        return found if bare else found.kept()

    def denoisers(self, host: Any) -> dict[str, nn.Module]:
        """Return the network. Raise UnsupportedModel if the loop is one compiled graph."""
        if hasattr(getattr(*host.runs), COMPILED):
            raise UnsupportedModel(
                f"the loop of this {host_name(host)} ({host.family.loop}) is compiled as one graph, network and "
                "all: no step in it can be skipped. Build the policy without compile_model; its network may be "
                "compiled."
            )
        return {host.name: host.network}

    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        """Return a watch on the method that is the loop."""
        return PolicyWatch(watcher)

    def arguments(self, host: Any) -> Parameters | None:
        """Return the parameters of the method that a robot calls, ``seed`` and ``num_inference_steps``."""
        return with_optional(parameters_of(getattr(host.policy, host.family.call)), "seed", STEPS)

    def check_callable(self, host: Any) -> None:
        """A policy can always be called."""

    def steps_asked(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return ``num_inference_steps`` of the call, or the policy's setting."""
        return int(call.get(STEPS) or host.steps)

    def iterations(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return the evaluations of the network, rounded up to whole steps."""
        evaluations: int = host.evaluations
        return math.ceil(int(call.get(STEPS) or host.steps) / evaluations) * evaluations

    def parts(self, host: Any) -> Mapping[str, Any]:
        """Return the policy, with every network in it."""
        return {"policy": host.policy}

    def settings(self, host: Any) -> Mapping[str, Any] | None:
        """Return the number of steps, and the name of the method that is the loop."""
        return {"steps": host.steps, "loop": host.family.loop}


class PolicyWatch(OwnLoopWatch):
    """Watches the policy's loop method: each of its calls is a sampling loop."""

    def attach(self) -> Iterator[Undo]:
        """Wrap the loop method, which then calls ``begin`` and ``end``."""
        yield from super().attach()
        owner, name = self.host.runs
        yield layer(owner, name, self._loop, copies=True)

    def outside(self) -> None:
        """Report nothing: policies call their networks in training."""

    def _loop(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the loop method."""
        return self.host.run(inner, *args, **kwargs)


KIND = Policy()
