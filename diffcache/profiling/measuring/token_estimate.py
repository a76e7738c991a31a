"""Estimate the time, the work, the memory and the flips of a token rule or schedule from a token profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffcache import host, tokens
from diffcache.documents.token_profile import TokenProfile
from diffcache.errors import Unusable
from diffcache.executor.cost import shown
from diffcache.kernels import FORMATS
from diffcache.profiling.measuring.token_walk import walk
from diffcache.profiling.recording.decoding import canvas_of, network_of
from diffcache.text import card, printable
from diffcache.tokens import TokenRule

EXACT = "exact"  # the precision of the model
SEEN = ("", "depth")  # needs of rules that decide by the masks and the changed tokens alone
INPUTS = {"attention": "the attention of its layers", "values": "the values of its layers"}  # of the other rules


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class TokenEstimate:
    """The expected time, work, memory and error of one call of a decoding loop.

    The recorded decodes give the order of the commits. A loop that commits in another order takes other positions.

    Attributes:
        rule: The spec of the rule, or the summary of the schedule.
        rows: The number of sequences in the call.
        forwards: The forwards of the call, a mean.
        compute_fraction: The share of the positions that the forwards compute, 0 to 1.
        seconds: The predicted seconds of the call. The time that kept rows in fewer bytes take to decode, and the time
            that ``logits=masks`` saves, do not count.
        full_seconds: The predicted seconds of the call without a cache.
        flips: The share of tokens that are predicted to differ from the full loop's at their commit, 0 to 1. Later
            tokens that differ because of them do not count.
        cache_bytes: The bytes of all kept tensors: keys, values, logits, and the inputs of layers for rules that need
            them.
        kv_bytes: Format -> the bytes of keys and values. ``"exact"`` is the precision of the model.
        kept_as: The format that ``cache_bytes`` counts.
    """

    rule: str
    rows: int
    forwards: float
    compute_fraction: float
    seconds: float
    full_seconds: float
    flips: float
    cache_bytes: int
    kv_bytes: Mapping[str, int]
    kept_as: str = EXACT

    @property
    def speedup(self) -> float:
        """The predicted speed-up of the call: ``full_seconds`` / ``seconds``."""
        return self.full_seconds / max(self.seconds, 1e-12)

    def __str__(self) -> str:
        calls = f"a call of {self.rows} sequence{'s' * (self.rows != 1)}"
        formats = ", ".join(f"{name} {shown(size)}" for name, size in self.kv_bytes.items())
        lines = [
            f"rule             {printable(self.rule)}",
            f"forwards         {self.forwards:.4g}, which compute {self.compute_fraction:.1%} of the positions",
            f"seconds          {self.seconds:.3g} in place of {self.full_seconds:.3g} for {calls}: "
            f"{self.speedup:.2f}x faster",
            f"tokens           {self.flips:.2%} are predicted to differ at their commit",
            f"cache            {shown(self.cache_bytes)} with logits, kept as {self.kept_as}",
            f"keys and values  {formats}",
        ]
        if self.kept_as != EXACT:
            lines.append(f"not counted      the time that rows kept as {self.kept_as} take to decode")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<TokenEstimate {self.compute_fraction:.1%} of the positions of {self.forwards:.4g} forwards, "
            f"{self.speedup:.2f}x, {self.flips:.2%} of the tokens differ, {shown(self.cache_bytes)} of cache>"
        )

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        return card("Estimate", str(self))


def estimate_decode(
    pipe: Any, source: Any, profile_of_calls: Callable[[], TokenProfile], store: str | None
) -> TokenEstimate:
    """Return what a token rule or schedule will save and cost.

    Args:
        pipe: A language model, a loop around one, or a diffusers pipeline with one. It is not accelerated.
        source: A token rule or a token schedule.
        profile_of_calls: Returns the measurements of the decoding loop. It is called after ``source`` was checked.
        store: The format in which keys and values are kept. None keeps the precision of the model.

    Raises:
        Unusable: The rule decides by attention or values, or the profile is of another model.
        DiffCacheError: All that ``diffcache.accelerate`` raises.
    """
    cache = tokens.cache_for(pipe, source, store=store)
    rule = cache.source
    _demand_seen(rule)
    host.demand_full_run(host.Loop(pipe) if isinstance(pipe, torch.nn.Module) else host.adopted(pipe))
    profile = profile_of_calls()
    _demand_same_model(pipe, profile)
    work = walk(profile, rule)
    decodes = len(range(0, len(profile.committed), profile.rows))
    total, formats = _bytes(pipe, cache, profile.positions)
    return TokenEstimate(
        rule=str(rule),
        rows=profile.rows,
        forwards=len(work.computed) / decodes,
        compute_fraction=float(np.mean(work.computed)) / profile.positions,
        seconds=work.seconds / decodes,
        full_seconds=work.full_seconds / decodes,
        flips=min(1.0, work.flips / float((profile.committed > 0).sum())),
        cache_bytes=total * profile.rows,
        kv_bytes={name: size * profile.rows for name, size in formats.items()},
        kept_as=cache.store,
    )


def _demand_seen(rule: TokenRule) -> None:
    """Raise Unusable for a rule that decides by what the network computes."""
    if rule.needs not in SEEN:
        raise Unusable(
            f"the token rule {str(rule)!r}",
            f"it decides by {INPUTS.get(rule.needs, rule.needs)}, which a profile does not hold",
            "Measure it: diffcache.evaluate(loop, {name: rule}, calls)",
        )


def _demand_same_model(pipe: Any, profile: TokenProfile) -> None:
    """Raise Unusable if a profile was measured on another network."""
    network = network_of(pipe)
    found = host.class_name(network)
    if found != profile.class_name or profile.config_digest not in (None, host.config_digest(network)):
        other = f"a {found}" if found != profile.class_name else f"a {found} with parameters of other names or shapes"
        raise Unusable(
            "profile",
            f"it was measured on a {profile.class_name}, and this model is {other}",
            "Measure this model: diffcache.measure(loop, calls)",
        )


def _bytes(pipe: Any, cache: Any, size: int) -> tuple[int, dict[str, int]]:
    """Run a forward of one sequence of ``size`` tokens, and count the bytes that it keeps.

    No token is masked, so that a store with a format for masks far from all tokens counts the larger format.

    Returns:
        The bytes of all kept tensors, and those of keys and values by format.
    """
    from diffcache.tokens.compact import CompactRows  # imports transformers

    network = network_of(pipe)
    device = next(network.parameters()).device
    ids = torch.full((1, size), int(cache.mask == 0), device=device)
    cache.attach()
    try:
        with torch.no_grad():
            network(ids)
        canvas = canvas_of(cache)
        total, rows = canvas.nbytes, canvas.cache.rows()
    finally:
        cache.detach()
    formats = {EXACT: sum(part.nbytes for pair in rows.values() for part in pair)}
    for name, how in FORMATS.items():
        formats[name] = sum(
            CompactRows.of(part, how, by_channel=is_key, backend="torch").nbytes
            for pair in rows.values()
            for part, is_key in zip(pair, (True, False), strict=True)
        )
    return total, formats
