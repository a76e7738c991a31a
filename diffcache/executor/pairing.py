"""Find the input that belongs to each output of a module: x of equation (1), for every tensor of F.

A block of a two-stream network (Flux, SD 3, CogVideoX) takes pictures and text, and returns both, in any order. The
streams are matched by shape. If their shapes are equal, they are matched by the tensors that one block of a stack
passes to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from diffcache import host
from diffcache.executor.store import Kept, Output
from diffcache.host.channels import Place, apart, carries, is_cut

MAIN = ""  # index of the main input in a flow


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a module.

    Attributes:
        main: The tensors of the main input: one tensor, or a list of samples.
        others: The other floating-point tensors of two or more dimensions, by name of the parameter.
    """

    main: tuple[Tensor, ...]
    others: Mapping[str, Tensor]

    def named(self) -> Mapping[str, Tensor]:
        """Return all inputs by name, the main one as ``MAIN``. It is empty if the main input is a list of samples."""
        return {MAIN: self.main[0], **self.others} if len(self.main) == 1 else {}


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which tensor of x belongs to which tensor of F.

    Attributes:
        names: The inputs that follow the tensors of the main one in x.
        own: For every tensor of F, the index in x of the tensor that belongs to it, or None if there is none.
        listed: Whether both are lists of samples.
        unclear: Whether shapes fit in more than one way.
        sample_slot: The part of the denoiser's main input that is the sample of the noise scheduler. None means that
            it is not known, or that the module is not the denoiser.
    """

    names: tuple[str, ...]
    own: tuple[int | None, ...]
    listed: bool = False
    unclear: bool = False
    sample_slot: Place | None = None

    def of(self, i: int) -> Place | None:
        """Return the part of tensor ``i`` of x that is the sample of the noise scheduler, or None."""
        return self.sample_slot if i == 0 and not self.listed else None

    def cut(self, x: Sequence[Tensor], outputs: Sequence[Kept]) -> bool:
        """Return whether an output belongs to a part of its input only."""
        pairs = zip(self.own, outputs, strict=True)
        return any(i is not None and is_cut(x[i].shape, like.shape, self.of(i)) for i, like in pairs)

    def carried(self, x: Sequence[Tensor], outputs: Sequence[Kept]) -> bool:
        """Return whether every output with an input can be given the part of the input that belongs to it."""
        pairs = zip(self.own, outputs, strict=True)
        return all(i is None or carries(x[i].shape, like.shape, self.of(i)) for i, like in pairs)

    def x(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return x of equation (1): the tensors of the main input, then those of ``names``."""
        return inputs.main + tuple(inputs.others[name] for name in self.names if name in inputs.others)


def reader(module: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Inputs]:
    """Return a function that makes ``Inputs`` of the arguments of a call of ``module``."""
    names, main, of = host.parameters(module), host.main_input(module), host.main_of(module)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        others = {k: v for k, v in [*zip(names, args, strict=False), *kwargs.items()] if k != main}
        streams = {k: v for k, v in others.items() if isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point()}
        return Inputs(Output.of(of(args, kwargs)).tensors, streams)

    return read


def alone(x: Sequence[Tensor], outputs: Sequence[Kept], *, root: bool = False) -> Pairing:
    """Return the pairing of a main input with outputs, by shape.

    Args:
        x: The tensors of the main input.
        outputs: The tensors of the output.
        root: Whether the module is the denoiser. Its input may hold conditions, and its output variances, so their
            shapes may differ in one dimension.
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
        inputs: The inputs of the module.
        outputs: The tensors of its output.
        flow: By name of an input (``MAIN`` for the main one): the index of the output that is this input of the next
            block.
        root: See ``alone``. All inputs but the main one have the shape of their output.
        sample_slot: See ``Pairing``.
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
    index = {MAIN: 0} | {name: 1 + n for n, name in enumerate(names)}
    of_outputs = (index[own[j]] if j in own else None for j in range(len(outputs)))
    return Pairing(names, tuple(of_outputs), unclear=unclear, sample_slot=sample_slot)


def _forced(fits: Mapping[str, set[int]], own: Mapping[int, str]) -> dict[int, str]:
    """Return a match that follows from the matches so far, or an empty dictionary.

    An input that fits one open output only belongs to it, if no other input but the main one fits that output. The main
    input comes first.

    Args:
        fits: The outputs that each input fits.
        own: The matches so far, from output to input.
    """
    taken = set(own.values())
    left = {name: fitting - own.keys() for name, fitting in fits.items() if name not in taken}
    for name, fitting in left.items():  # the main input is the first
        rivals = [other for other in left if other not in (name, MAIN) and left[other] & fitting]
        if len(fitting) == 1 and (name == MAIN or not rivals):
            return {next(iter(fitting)): name}
    return {}


def _own(x: Sequence[Tensor], j: int, outputs: Sequence[Kept], root: bool) -> int | None:
    """Return the index of the tensor of the main input that belongs to output ``j``, or None.

    It is a tensor of the same shape, or else one that has the shape of no output and differs in one dimension.
    """
    like = outputs[j]
    if j < len(x) and x[j].shape == like.shape:
        return j
    fitting = [i for i, t in enumerate(x) if t.shape == like.shape]
    if not fitting:
        left = [i for i, t in enumerate(x) if all(t.shape != other.shape for other in outputs)]
        fitting = [i for i in left if carries(x[i].shape, like.shape, None) or (root and _wider(x[i], like))]
    return j if j in fitting else fitting[0] if fitting else None


def _wider(x: Tensor, output: Kept) -> bool:
    """Return whether an input may hold conditions in addition to the sample that the output belongs to."""
    d = apart(x.shape, output.shape)
    return bool(d) and x.shape[d or 0] > output.shape[d or 0]
