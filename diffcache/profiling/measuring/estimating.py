"""Estimate what a schedule saves and costs, before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffcache import host
from diffcache.api import Schedule, is_for_tokens, loaded, resolve_all
from diffcache.documents.token_profile import TokenProfile
from diffcache.errors import BadOption, Unusable
from diffcache.executor.bound import Bound
from diffcache.executor.cost import Estimate, estimate_for
from diffcache.profiling.measuring.token_estimate import TokenEstimate, estimate_decode
from diffcache.profiling.measuring.token_measure import demand_loop, measure_decodes


def estimate(
    pipe: Any,
    schedule: Schedule,
    *,
    store: str | None = None,
    timed: bool = False,
    profile: TokenProfile | str | Path | None = None,
    **call: Any,
) -> Estimate | TokenEstimate:
    """Return what ``schedule`` will save and cost in ``pipe(**call)``.

    Only the first step of the call runs, and ``pipe`` remains unchanged. It may be accelerated. If a rule decides in
    the run, only limits of its saving are known. Up to 12 of the first steps that it decides about then run as well, to
    see whether it skips any; not if ``pipe`` is accelerated.

    The first step does not show how long text encoders and the VAE take. ``timed=True`` runs the call once in full and
    reports the share of its time outside of the sampling loop, which a schedule does not shorten.

    For a language model, the estimate follows from a profile. Without one, the call is measured first, which runs it
    in full three times. The model must not be accelerated. One forward of a single sequence runs, to count the bytes.

    Args:
        pipe: See :func:`accelerate`.
        schedule: See :func:`accelerate`.
        store: See :func:`accelerate`.
        timed: Whether to run the call once in full as well, and time it. ``pipe`` must not be accelerated.
        profile: For a language model, measurements of its decoding loop by :func:`measure`, or their path. The
            arguments of a call are left out then.
        **call: The arguments of the call.

    Returns:
        The expected work and memory. Printed, it is one sentence. Of a language model, it is a ``TokenEstimate``.

    Raises:
        Unusable: An argument does not apply, or a token rule decides by attention or values.
        DiffCacheError: All that :func:`accelerate` raises.

    Example:
        >>> print(diffcache.estimate(pipe, "uniform:every=3", prompt="a lighthouse", num_inference_steps=30))

        Of a language model, compare rules on one measurement:

        >>> profile = diffcache.measure(loop, calls)
        >>> print(diffcache.estimate(loop, "dkv:refresh=8", profile=profile))
    """
    schedule = loaded(schedule, for_tokens=host.language_model_of(pipe) is not None)
    if is_for_tokens(pipe, schedule):
        if timed:
            raise Unusable("timed", "an estimate for a language model always holds seconds", "Leave out timed")
        return estimate_decode(pipe, schedule, lambda: _profile(pipe, profile, call), store)
    if profile is not None:
        raise Unusable("profile", "it applies to token rules and token schedules", "Pass the arguments of a call")
    return estimate_for(Bound.of(pipe), resolve_all(schedule), call, store, timed=timed)


def _profile(pipe: Any, profile: object, call: dict[str, Any]) -> TokenProfile:
    """Return the profile that was given, or measure the call."""
    if profile is None:
        if not call:
            raise Unusable(
                "profile",
                "neither a profile nor the arguments of a call are given",
                "Pass profile=diffcache.measure(loop, calls), or the arguments of your loop",
            )
        loop = host.adopted(pipe)
        demand_loop(loop)
        host.check_calls(loop, [call])
        return measure_decodes(loop, [call], progress=False)
    if call:
        given = ", ".join(call)
        raise Unusable("profile", f"arguments of a call are given as well: {given}", "Leave out one of the two")
    found = TokenProfile.load(profile) if isinstance(profile, (str, Path)) else profile
    if not isinstance(found, TokenProfile):
        raise BadOption("profile", type(profile).__name__, "a TokenProfile that diffcache.measure returns, or its path")
    return found
