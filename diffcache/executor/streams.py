"""Which of a module's inputs carries on in which of its outputs: x of equation (1), for every tensor of F.

A block of a two-stream network (Flux, SD 3, CogVideoX) is given pictures and text, and returns both, in an order of its
own. Shapes tell the streams apart; where they are equal, the tensors that one block of a stack hands to the next do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffcache import host
from diffcache.store import Kept, Output, channel_dim

MAIN = ""  # in a flow: the main input


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a module was given.

    main    tensors of the first parameter: one, or a list of samples
    others  other floating-point tensors with a batch and something in it, by name of the parameter
    """

    main: tuple[Tensor, ...]
    others: Mapping[str, Tensor]

    def named(self) -> Mapping[str, Tensor]:
        return {MAIN: self.main[0], **self.others} if len(self.main) == 1 else {}


@dataclass(frozen=True, slots=True)
class Pairing:
    """How x goes with F.

    names    inputs that follow the tensors of the main one in x
    own      for every tensor of F, the index in x of the one it carries on; None: there is none
    listed   whether both are lists of samples
    unclear  whether shapes fit in more than one way
    """

    names: tuple[str, ...]
    own: tuple[int | None, ...]
    listed: bool = False
    unclear: bool = False

    def x(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs.main + tuple(inputs.others[name] for name in self.names if name in inputs.others)


def reader(module: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Inputs]:
    """The function that takes a call's arguments apart."""
    names, main, of = host.parameters(module), host.main_input(module), host.main_of(module)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        others = {k: v for k, v in [*zip(names, args, strict=False), *kwargs.items()] if k != main}
        streams = {k: v for k, v in others.items() if isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point()}
        return Inputs(Output.of(of(args, kwargs)).tensors, streams)

    return read


def alone(x: Sequence[Tensor], outputs: Sequence[Kept]) -> Pairing:
    """The pairing of a main input with outputs, by shape but for the channels."""
    own = (_own(x, j, like) if like.is_floating_point() else None for j, like in enumerate(outputs))
    return Pairing((), tuple(own), listed=len(outputs) == len(x) > 1)


def pair(inputs: Inputs, outputs: Sequence[Tensor], flow: Mapping[str, int]) -> Pairing:
    """The pairing of all inputs with outputs.

    flow  name of an input (MAIN: the main one) -> index of the output that became this input of the next block

    The main input may differ from its output in the channels (conditions come in, variances go out), others may not.
    """
    simple = alone(inputs.main, outputs)
    streams = {n: t for n, t in inputs.others.items() if any(t.shape == out.shape for out in outputs)}
    if len(inputs.main) != 1 or not streams:
        return simple
    fits = {
        name: {
            j
            for j, out in enumerate(outputs)
            if out.is_floating_point()
            and (without_channels(t) == without_channels(out) if name == MAIN else t.shape == out.shape)
        }
        for name, t in {MAIN: inputs.main[0], **streams}.items()
    }
    own = {j: name for name, j in flow.items() if j in fits.get(name, ())}
    while found := _forced(fits, own):
        own |= found
    open_outputs = set().union(*fits.values()) - own.keys()
    unclear = any(fits[name] & open_outputs for name in fits if name not in own.values())
    names = tuple(name for name in streams if name in own.values() or unclear)
    places = {MAIN: 0} | {name: 1 + n for n, name in enumerate(names)}
    return Pairing(names, tuple(places[own[j]] if j in own else None for j in range(len(outputs))), unclear=unclear)


def without_channels(t: Kept) -> list[int]:
    return [n for d, n in enumerate(t.shape) if d != channel_dim(t)]


def _forced(fits: Mapping[str, set[int]], own: Mapping[int, str]) -> dict[int, str]:
    """What follows: an input that fits one open output alone has it, the main one before all others."""
    taken = set(own.values())
    left = {name: fitting - own.keys() for name, fitting in fits.items() if name not in taken}
    for name, fitting in left.items():  # the main input is the first
        rivals = [other for other in left if other not in (name, MAIN) and left[other] & fitting]
        if len(fitting) == 1 and (name == MAIN or not rivals):
            return {next(iter(fitting)): name}
    return {}


def _own(x: Sequence[Tensor], j: int, like: Kept) -> int | None:
    """Which tensor of the main input belongs to output tensor ``j``: the one of its shape, channels apart."""
    if j < len(x) and x[j].shape == like.shape:
        return j
    fitting = [i for i, t in enumerate(x) if without_channels(t) == without_channels(like)]
    return j if j in fitting else fitting[0] if fitting else None
