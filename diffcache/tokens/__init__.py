"""Cache keys and values of masked diffusion language models: compute some positions at each step, keep the others.

A bidirectional decoder recomputes every position at every step. Here a rule names the positions to compute (the fresh
set), the original forward runs on these alone, and the attention reads kept keys and values of all other positions.
The engine needs transformers, and is imported when a model is accelerated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffcache import host
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.tokens.spec import DEFAULT, TokenRule, is_token_rule, parse_token_rule, token_rules
from diffcache.tokens.view import Fresh, View

if TYPE_CHECKING:
    from diffcache.tokens.engine import TokenCache
    from diffcache.tokens.report import TokenReport

__all__ = [
    "DEFAULT",
    "RULES",
    "Fresh",
    "TokenRule",
    "View",
    "announce",
    "cache_for",
    "is_token_rule",
    "parse_token_rule",
    "report_of",
    "token_rules",
]

RULES = f"{__name__}.rules"
SHIFTED = ("Dream",)  # values of config.model_type: the logits at position j - 1 decode position j


def cache_for(
    pipe: Any, spec: object, *, strict: bool = True, store: str | None = None, backend: Any = "auto"
) -> TokenCache:
    """Return the token cache of a language model. It is not attached.

    Args:
        pipe: A language model, a loop around one, or a diffusers pipeline with one.
        spec: A token rule, such as ``"dkv:refresh=8"``, or a token schedule.
        strict: Whether to compare the configuration of the network with that of a schedule.
        store: The format in which keys and values are kept. None keeps the precision of the model.
        backend: What runs operations on kept rows.

    Raises:
        UnsupportedModel: ``pipe`` has no language model.
        UnknownName: There is no such rule, option or format.
        ScheduleMismatch: A schedule was made for another network.
        BadOption: The id of the mask token is not known or not in the vocabulary, the model cannot be accelerated, or
            an option is out of range.
    """
    from dataclasses import replace

    from diffcache.tokens import planned
    from diffcache.tokens.engine import TokenCache
    from diffcache.tokens.suitability import demand_decoder, vocabulary_of

    network = host.language_model_of(pipe)
    if network is None:
        kind = "schedule" if isinstance(spec, TokenSchedule) else "rule"
        raise UnsupportedModel(
            f"a token {kind} was given for a {host.host_name(pipe)}. Allowed: a language model that decodes masks "
            "(a transformers model with an output embedding), a loop around one, or a diffusers pipeline for text."
        )
    rule = parse_token_rule(spec, model=type(network).__name__)
    demand_decoder(network)
    if isinstance(spec, TokenSchedule):
        planned.demand_network(spec, network, strict=strict)
    mask = host.mask_id_of(pipe) if rule.mask is None else rule.mask
    if mask is None:
        option = f'"{rule},mask=…", or ' if isinstance(spec, str) else ""
        option = "TokenRule(…, mask=…), or " if isinstance(spec, TokenRule) else option
        raise BadOption("mask", None, f"the id of the mask token: {option}model.config.mask_token_id")
    size = vocabulary_of(network)
    if size is not None and not 0 <= mask < size:
        raise BadOption("mask", mask, f"the id of the mask token, from 0 to {size - 1}: the model has {size} tokens")
    if rule.shift is None:
        rule = replace(rule, shift=getattr(getattr(network, "config", None), "model_type", "") in SHIFTED)
    return TokenCache(network, rule, mask, store=store, backend=backend)


def announce(model: Any, positions: Any) -> None:
    """State the positions that a loop decodes after the next forward, for rules that compute them.

    Call it before each forward, in a loop that chooses its positions in advance. Without a token rule it does nothing.

    Args:
        model: The model that the loop calls.
        positions: bool [B, N], or int64 [B, n], the positions of each row.

    Raises:
        BadOption: ``positions`` is neither.
    """
    mark = getattr(host.adopted(model, bare=True), "__dict__", {}).get(host.MARK)
    put = getattr(getattr(mark, "executor", None), "announce", None)
    if put is not None:
        put(positions)


def report_of(cache: Any) -> TokenReport:
    """Return the report of the last canvas of a ``TokenCache``, or of the canvas in progress."""
    from diffcache.tokens import report

    return report.report_of(cache)
