"""Measure a language model: record full decodes, time forwards, and make a token profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from diffcache import host
from diffcache.documents.token_profile import TokenProfile
from diffcache.errors import Unusable
from diffcache.profiling.fitting.drift_tables import fit_drift
from diffcache.profiling.recording.decode_times import Times, time_decode
from diffcache.profiling.recording.decoding import AGES, PARTS, Decoding, record_decodes


def measure_decodes(pipe: Any, calls: Sequence[Mapping[str, Any]], *, progress: bool) -> TokenProfile:
    """Return the profile of a language model on ``calls``.

    Args:
        pipe: A loop around a language model, or a pipeline with one.
        calls: The arguments of the loop, one dictionary for each batch.
        progress: Whether to show a bar.

    Raises:
        Unusable: The canvases of the calls differ in length, or a call decodes nothing.
    """
    times = time_decode(pipe, calls[0])
    with tqdm(total=len(calls), desc="record", unit="call", disable=not progress) as bar:
        decodes = record_decodes(pipe, calls, lambda: bar.update(1))
    return profile_of(pipe, decodes, times)


def profile_of(pipe: Any, decodes: Sequence[Decoding], times: Times) -> TokenProfile:
    """Return the profile of recorded decodes.

    Args:
        pipe: A loop around a language model, or a pipeline with one.
        decodes: The decodes, one for each call.
        times: The times of forwards.

    Raises:
        Unusable: The canvases of the calls differ in length, or a decode has too few parts.
    """
    sizes = sorted({one.masked[0].shape[1] for one in decodes})
    if len(sizes) > 1:
        raise Unusable(
            "calls", f"their canvases have {' and '.join(map(str, sizes))} positions", "Pass calls of one length"
        )
    errors = [found for one in decodes for found in one.errors]
    changes = [found for one in decodes for found in one.changes]
    if not errors:
        raise Unusable(
            "calls",
            "no decode has a step after a quarter of its masks and before the last one",
            "Pass calls with more steps",
        )
    network = host.language_model_of(pipe)
    layers = len(errors[0])
    return TokenProfile(
        class_name=host.class_name(network),
        config_digest=host.config_digest(network),
        layers=layers,
        forwards=float(np.mean([len(one.masked) for one in decodes])),
        drift=fit_drift([one.masked for one in decodes], [one.drift for one in decodes]),
        ages=np.array([0.0, *(age / PARTS for age in AGES)]),
        errors=np.concatenate([np.zeros((layers, 1)), np.mean(errors, axis=0)], 1),
        changes=np.concatenate([np.zeros((layers, 3, 1)), _mean(changes)], 2),
        counts=np.array(times.counts, float),
        seconds=np.array(times.seconds),
        outside=times.outside,
        committed=np.concatenate([one.committed for one in decodes]).astype(float),
        margins=np.concatenate([one.margins for one in decodes]).clip(0, 1),
        flip_rate=sum(one.flips for one in decodes) / max(sum(one.risks for one in decodes), 1e-12),
        rows=len(decodes[0].committed),
        provenance={"calls": str(len(decodes))},
    )


def demand_loop(pipe: Any) -> None:
    """Raise BadOption unless the loop of ``pipe`` can be run: a network alone has none."""
    if isinstance(pipe, nn.Module) or getattr(pipe, "sampler", pipe) is None:  # a network, or a Loop that only wraps it
        raise Unusable(
            f"this {host.host_name(pipe)}",
            "it has no function that runs your decoding loop",
            "Pass diffcache.Loop(model, sample), where sample runs the loop",
        )


def _mean(changes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over trials, [L, 3, A]; 0 where no trial had positions of a class."""
    stacked = np.stack(changes)
    there = ~np.isnan(stacked)
    mean: np.ndarray = np.where(there, stacked, 0).sum(0) / np.maximum(there.sum(0), 1)
    return mean
