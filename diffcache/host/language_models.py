"""Recognise language models that decode masks, and find their mask token."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffcache.host.inspection import has_components, parameters, unwrapped
from diffcache.host.own_loops import Loop

COMPONENT = "model"  # the network of a diffusers pipeline for text


def language_model_of(value: Any) -> nn.Module | None:
    """Return the language model in ``value``, or None.

    A language model is a network with an output embedding and a forward that takes ``input_ids``, as in
    transformers.

    Args:
        value: A network, a :class:`diffcache.Loop` of one, or a diffusers pipeline with the component ``model``.
    """
    if isinstance(value, Loop):
        value = value.network
    elif not isinstance(value, nn.Module):
        value = getattr(value, COMPONENT, None) if has_components(value) else None
    if not isinstance(value, nn.Module) or "input_ids" not in parameters(value):
        return None
    embedding = getattr(unwrapped(value), "get_output_embeddings", None)
    return value if callable(embedding) and embedding() is not None else None


def mask_id_of(value: Any) -> int | None:
    """Return the id of the mask token: of a pipeline, its tokenizer, or the configuration of the network.

    Args:
        value: See ``language_model_of``.
    """
    network = language_model_of(value)
    config = getattr(network, "config", None)
    for owner in (value, getattr(value, "tokenizer", None), config):
        found = getattr(owner, "mask_token_id", None)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None
