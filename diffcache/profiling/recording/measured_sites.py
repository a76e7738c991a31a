"""The sites that are measured: which modules they are, layers on them, and their tensors as vectors of one sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcache import host
from diffcache.documents.sites import GRANULARITIES, Granularity, parse
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.executor.store import Output, batch_first
from diffcache.patch import Wrapper, layer, spot

ELEMENTS = 2**13  # kept of one tensor of one sample; means over so many differ little from those over all
SEED = 0  # seed for the choice of tokens

Places = Mapping[str, tuple[nn.Module, ...]]  # site -> the modules whose calls make it up


def granularities(sites: str | Sequence[str]) -> tuple[Granularity, ...]:
    """Return the granularities in ``"block"``, ``"model,block"`` or a list of names, coarsest first, with the model.

    Raises:
        BadOption: One of them is not a granularity.
    """
    if not isinstance(sites, (str, Sequence)):
        raise BadOption("sites", sites, f"one or several of {', '.join(GRANULARITIES)}")
    names = sites.split(",") if isinstance(sites, str) else list(sites)
    asked = {name.strip() if isinstance(name, str) else name for name in names}
    if not asked or not asked <= set(GRANULARITIES):
        raise BadOption("sites", sites, f"one or several of {', '.join(GRANULARITIES)}")
    return tuple(g for g in GRANULARITIES if g == "model" or g in asked)


def inner_places(name: str, found: Places, asked: Sequence[Granularity]) -> Places:
    """Return the sites of a network below the model, of these granularities.

    Args:
        name: The component name of the network.
        found: All of its sites.
        asked: The granularities.

    Raises:
        UnsupportedModel: The network has no site of one of the granularities, or a site is in a compiled graph.
    """
    (denoiser,) = found["model"]
    for granularity in asked:
        if not any(parse(site).granularity == granularity for site in found):
            there = [g for g in GRANULARITIES if any(parse(site).granularity == g for site in found)]
            raise UnsupportedModel(
                f"{host.class_name(denoiser)}, the {name}, has no sites of the granularity {granularity!r}: its blocks "
                f"differ or are not in a list. It has {', '.join(there)}."
            )
    chosen = {s: m for s, m in found.items() if s != "model" and parse(s).granularity in asked}
    for site in chosen:
        parts = parse(site).path.split(".")
        for around in (".".join(parts[:n]) for n in range(len(parts))):
            if host.is_compiled(denoiser.get_submodule(around)):
                raise UnsupportedModel(
                    f"{site!r} of the {name} lies inside {around or name!r}, which is compiled as one graph. Measure "
                    "the pipeline before you compile it."
                )
    return chosen


@contextlib.contextmanager
def layered(arounds: Iterable[tuple[nn.Module, Wrapper]]) -> Iterator[None]:
    """Put layers on modules for the length of the block."""
    with contextlib.ExitStack() as undo:
        for module, around in arounds:
            undo.callback(layer(*spot(module), around))
        yield


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the tensors of a forward's main input."""
    return Output.of(host.main_of(module)(args, kwargs)).tensors


def of_samples(tensors: Sequence[Tensor], batch: int, listed: bool) -> list[Tensor] | None:
    """Return [tokens, channels] of each of ``batch`` samples.

    Args:
        tensors: One tensor [batch or a multiple, …], or a list of samples. Channels are dimension 1 of pictures and
            videos, and the last dimension of token sequences.
        batch: Number of samples.
        listed: Whether ``tensors`` is a list of samples.

    Returns:
        None if the tensor is not a batch of samples.
    """
    if listed:
        return [_tokens(t[None], 1)[0] for t in tensors] if len(tensors) == batch else None
    tensor = tensors[0]
    if tensor.ndim < 2 or len(tensor) == 0 or not batch_first(tensor, batch):
        return None
    return list(_tokens(tensor, batch))


def _tokens(tensor: Tensor, batch: int) -> Tensor:
    if tensor.ndim >= 4:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(batch, -1, tensor.shape[-1])


def few(tensor: Tensor, batch: int) -> Tensor | None:
    """Return a few tokens of a tensor, [batch, tokens, channels]; None if it is not a batch of samples.

    The choice depends only on the number of tokens and channels. If all tokens are chosen, the result is a view.
    """
    if tensor.ndim < 2 or len(tensor) == 0 or not batch_first(tensor, batch) or not tensor.is_floating_point():
        return None
    tokens = _tokens(tensor.detach(), batch)
    index = _chosen(tokens.shape[1], max(1, ELEMENTS // tokens.shape[2]), tensor.device)
    return tokens if index is None else tokens.index_select(1, index)


@functools.cache
def _chosen(tokens: int, most: int, device: torch.device) -> Tensor | None:
    if tokens <= most:
        return None
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(SEED))
    return order[:most].sort().values.to(device)


def main_output(outputs: Sequence[Tensor], shape: torch.Size | None, moved: Callable[[Tensor], float]) -> int:
    """Return the index of the output that corresponds to the main input.

    It is an output of the input's shape; else of its shape except for channels; else the first. Of several, it is the
    one nearest to the input, because blocks add to their input.

    Args:
        outputs: The tensors of the output.
        shape: Shape of the main input, or None.
        moved: Returns the distance of an output from the input.
    """
    if shape is None or len(outputs) == 1:
        return 0
    alike = [j for j, t in enumerate(outputs) if t.shape == shape]
    alike = alike or [j for j, t in enumerate(outputs) if _without_channels(t.shape) == _without_channels(shape)]
    return min(alike, key=lambda j: moved(outputs[j])) if len(alike) > 1 else alike[0] if alike else 0


def _without_channels(shape: torch.Size) -> list[int]:
    return [n for d, n in enumerate(shape) if d != (1 if len(shape) >= 4 else len(shape) - 1)]
