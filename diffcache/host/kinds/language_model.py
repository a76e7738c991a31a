"""Language models that decode masks: the loop belongs to the user or to a diffusers pipeline for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffcache.host.kinds._kind import unsupported
from diffcache.host.kinds.own_loop import OwnLoop
from diffcache.host.language_models import language_model_of
from diffcache.host.own_loops import Loop, registered_loop
from diffcache.host.traits import Traits


class LanguageModel(OwnLoop):
    """A transformers language model, a loop around one, or a diffusers pipeline with one."""

    traits = Traits(returns="tokens", metrics=("state",), writes_arguments=True)
    allowed = "a language model that decodes masks (a transformers model with an output embedding)"
    example = """\
calls = [{"seed": seed, "prompt": prompt}
         for seed, prompt in enumerate(prompts)]"""
    fallback = False

    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` is a language model, a :class:`diffcache.Loop` or a pipeline with one."""
        return language_model_of(value) is not None

    def adopt(self, value: Any, *, bare: bool = False) -> Any:
        """Return the loop. The loop of a pipeline runs the pipeline."""
        if isinstance(value, (Loop, nn.Module)) and not bare:
            return value
        network = language_model_of(value)
        if network is None:
            raise unsupported(value)
        return registered_loop(network) if bare else Loop(network, value)

    def check_values(self, call: Mapping[str, Any], where: str) -> None:
        """Allow every value: the loop of a language model may take prompts as text or as token ids."""


KIND = LanguageModel()
