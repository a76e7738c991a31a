"""Check whether the keys and values of a network can be kept by position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffcache.errors import Unusable
from diffcache.host import is_compiled, parameters, unwrapped
from diffcache.tokens.layers import EMBEDDINGS, decoder_layers
from diffcache.tokens.rotary_blocks import blocks_of

CACHES = ("cache", "past_key_values")  # the argument's name since and before transformers 5.24
OF_TRANSFORMERS = "transformers.models."  # the modules of its decoders, which read config.is_causal
EQUAL = 1e-5  # the largest difference between logits that are equal, as a share of the largest logit
BY_MASK = ("opt",)  # values of config.model_type: positions follow from the attention mask


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of the class's forward, without ``self``. A forward on the object may be a wrapper."""
    return inspect.signature(type(unwrapped(model)).forward.__get__(model))


def takes_positions(model: nn.Module) -> bool:
    """Return whether the forward takes ``position_ids`` and a cache of transformers."""
    names = signature_of(model).parameters
    return "position_ids" in names and any(cache in names for cache in CACHES)


def demand_decoder(model: nn.Module) -> None:
    """Raise Unusable unless the keys and values of ``model`` can be kept by position."""
    names, config = signature_of(model).parameters, getattr(model, "config", None)
    title = type(unwrapped(model)).__name__
    if "decoder_input_ids" in names:
        raise Unusable(
            title,
            "it has an encoder, and a decoder with tokens that are all drawn anew at every step",
            "Use it without diffcache: its pipeline keeps the keys and values of the prompt already",
        )
    if not takes_positions(model) and not blocks_of(model):
        raise Unusable(
            title,
            "its forward takes no position_ids, or no cache, and its blocks are not built like LLaDA's",
            "Pass a decoder with a forward that takes input_ids, position_ids and a transformers cache",
        )
    of_transformers = type(unwrapped(model)).__module__.startswith(OF_TRANSFORMERS)
    if of_transformers and getattr(config, "is_causal", True):
        raise Unusable(
            title,
            "its attention is causal, so it decodes one token after the other",
            "Pass a model that was trained to decode masks, with config.is_causal = False",
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds - {"full_attention"} or (window and not kinds):
        found = ", ".join(sorted(kinds)) or f"a sliding window of {window} positions"
        raise Unusable(
            title,
            f"its layers do not all attend to every position ({found})",
            "Use a model with full attention in every layer",
        )
    if getattr(config, "model_type", "") in BY_MASK:
        raise Unusable(title, "it computes positions from the attention mask", "Use a model with rotary embeddings")
    if rope_types(config) & {"dynamic", "longrope"}:
        raise Unusable(
            title,
            "its rotary frequencies depend on the length (dynamic NTK, longrope), so kept keys become wrong",
            "Use another rope_type",
        )


def demand_layers(model: nn.Module, rule: str) -> None:
    """Raise Unusable if the layers of ``model`` cannot be wrapped, because it is compiled.

    Args:
        model: A language model.
        rule: The spec of the rule that reads the layers, for the error.
    """
    if any(is_compiled(part) for part in model.modules()):
        raise Unusable(
            f"the token rule {rule!r}",
            "it reads the layers of the model, which is compiled",
            "Use a rule without depth: dkv, dual; or a model that is not compiled",
        )


def demand_depth(model: nn.Module, rule: str) -> None:
    """Raise Unusable unless the layers of ``model`` can compute more positions than the layers before them.

    Args:
        model: A language model.
        rule: The spec of the rule that needs it, for the error.
    """
    if not takes_positions(model):
        raise Unusable(
            f"the token rule {rule!r}",
            "it computes more positions from a layer on, and the layers of this model take no positions",
            "Use a rule without depth: dkv, dual, prefix or vicinity",
        )
    demand_layers(model, rule)
    for module in decoder_layers(model):
        if EMBEDDINGS not in parameters(module):
            raise Unusable(
                type(model).__name__,
                f"the rule computes more positions from a layer on; {type(module).__name__} takes no {EMBEDDINGS}",
                "Use a rule without depth: dkv, dual",
            )


def takes_depth(model: nn.Module) -> bool:
    """Return whether the layers of ``model`` can compute more positions than the layers before them."""
    try:
        demand_depth(model, "")
    except Unusable:
        return False
    return True


def demand_two_directions(model: nn.Module) -> None:
    """Raise Unusable if a decoder of another package attends to earlier positions only.

    Such a class need not read ``config.is_causal``. So the decoder runs on two rows of four tokens that differ after
    the first one. If the logits at the first position are equal, it has not seen the others.
    """
    plain: Any = unwrapped(model)
    first = next(plain.parameters(), None)
    if type(plain).__module__.startswith(OF_TRANSFORMERS) or plain.training or first is None or first.is_meta:
        return
    ids = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], device=first.device)
    try:
        with torch.no_grad():
            # the function of the class: the model may be accelerated by a rule that this one replaces
            logits = type(plain).forward(plain, ids).logits[:, 0].float()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return  # it needs other arguments; its first forward shows whether it can be cached
    if (logits[0] - logits[1]).abs().max() <= EQUAL * logits.abs().max():
        raise Unusable(
            type(plain).__name__,
            "its attention is causal: the logits at a position do not depend on the tokens after it",
            "Pass a model that was trained to decode masks, with attention in both directions",
        )


def vocabulary_of(model: nn.Module) -> int | None:
    """Return the number of token ids of a model, from its output projection. None if that does not state it."""
    head = unwrapped(model).get_output_embeddings()
    found = getattr(head, "out_features", getattr(head, "num_embeddings", None))
    return found if isinstance(found, int) else None


def rope_types(config: Any) -> set[str]:
    """Return the types of rotary embeddings that a configuration names, of any kind of layer."""
    found: set[str] = set()
    left = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            found |= {str(one[name]) for name in ("rope_type", "type") if name in one}
            left += one.values()
    return found
