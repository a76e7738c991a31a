"""Which of a module's inputs carries on in which of its outputs: x of equation (1), for every tensor of F.

A block of a two-stream network (Flux, SD 3, CogVideoX) is given pictures and text, and returns both, in an order of its
own. Shapes tell the streams apart; where they are equal, the tensors that one block of a stack hands to the next do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from diffcache import host
from diffcache.executor.store import Kept, Output
from diffcache.host.channels import Place, apart, carries, is_cut

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
    place    where the noise scheduler's sample lies in the main input of the denoiser, as far as it is known
    """

    names: tuple[str, ...]
    own: tuple[int | None, ...]
    listed: bool = False
    unclear: bool = False
    sample_slot: Place | None = None

    def of(self, i: int) -> Place | None:
        """Return what of the tensor ``i`` of x is the sample."""
        return self.sample_slot if i == 0 and not self.listed else None

    def cut(self, x: Sequence[Tensor], outputs: Sequence[Kept]) -> bool:
        """Return whether some output carries on a part of its input only."""
        pairs = zip(self.own, outputs, strict=True)
        return any(i is not None and is_cut(x[i].shape, like.shape, self.of(i)) for i, like in pairs)

    def carried(self, x: Sequence[Tensor], outputs: Sequence[Kept]) -> bool:
        """Return whether every output that carries on an input can be given its part of it."""
        pairs = zip(self.own, outputs, strict=True)
        return all(i is None or carries(x[i].shape, like.shape, self.of(i)) for i, like in pairs)

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


def alone(x: Sequence[Tensor], outputs: Sequence[Kept], *, root: bool = False) -> Pairing:
    """Return the pairing of a main input with outputs, by shape.

    Args:
        x: tensors of the main input.
        outputs: tensors of the output.
        root: they are the denoiser's own, whose shapes may differ in one dimension: conditions come in, variances go
            out.
    """
    own = (_own(x, j, outputs, root) if like.is_floating_point() else None for j, like in enumerate(outputs))
    return Pairing((), tuple(own), listed=len(outputs) == len(x) > 1)


def pair(
    inputs: Inputs,
    outputs: Sequence[Tensor],
    flow: Mapping[str, int],
    *,
    root: bool = False,
    sample_slot: Place | None = None,
) -> Pairing:
    """Return the pairing of all inputs with outputs.

    Args:
        inputs: what the module was given.
        outputs: tensors of what it returned.
        flow: name of an input (MAIN: the main one) -> index of the output that became this input of the next block.
        root: see ``alone``; inputs other than the main one have the shape of their output.
        place: see Pairing.
    """
    simple = replace(alone(inputs.main, outputs, root=root), sample_slot=sample_slot)
    streams = {n: t for n, t in inputs.others.items() if any(t.shape == out.shape for out in outputs)}
    if len(inputs.main) != 1 or not streams:
        return simple
    fits = {
        name: {j for j, out in enumerate(outputs) if out.is_floating_point() and t.shape == out.shape}
        for name, t in {MAIN: inputs.main[0], **streams}.items()
    }
    if not fits[MAIN]:
        fits[MAIN] = {j for j, i in enumerate(simple.own) if i == 0}
    own = {j: name for name, j in flow.items() if j in fits.get(name, ())}
    while found := _forced(fits, own):
        own |= found
    open_outputs = set().union(*fits.values()) - own.keys()
    unclear = any(fits[name] & open_outputs for name in fits if name not in own.values())
    names = tuple(name for name in streams if name in own.values() or unclear)
    places = {MAIN: 0} | {name: 1 + n for n, name in enumerate(names)}
    of_outputs = (places[own[j]] if j in own else None for j in range(len(outputs)))
    return Pairing(names, tuple(of_outputs), unclear=unclear, sample_slot=sample_slot)


def _forced(fits: Mapping[str, set[int]], own: Mapping[int, str]) -> dict[int, str]:
    """What follows: an input that fits one open output alone has it, the main one before all others."""
    taken = set(own.values())
    left = {name: fitting - own.keys() for name, fitting in fits.items() if name not in taken}
    for name, fitting in left.items():  # the main input is the first
        rivals = [other for other in left if other not in (name, MAIN) and left[other] & fitting]
        if len(fitting) == 1 and (name == MAIN or not rivals):
            return {next(iter(fitting)): name}
    return {}


def _own(x: Sequence[Tensor], j: int, outputs: Sequence[Kept], root: bool) -> int | None:
    """Which tensor of the main input belongs to output ``j``: the one of its shape; else one that has the shape of no
    output, and differs from this one in one dimension."""
    like = outputs[j]
    if j < len(x) and x[j].shape == like.shape:
        return j
    fitting = [i for i, t in enumerate(x) if t.shape == like.shape]
    if not fitting:
        left = [i for i, t in enumerate(x) if all(t.shape != other.shape for other in outputs)]
        fitting = [i for i in left if carries(x[i].shape, like.shape, None) or (root and _wider(x[i], like))]
    return j if j in fitting else fitting[0] if fitting else None


def _wider(x: Tensor, output: Kept) -> bool:
    """Return whether an input may hold conditions beside what the output carries on."""
    d = apart(x.shape, output.shape)
    return bool(d) and x.shape[d or 0] > output.shape[d or 0]
