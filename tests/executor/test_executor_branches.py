"""Guidance in one batch is known by branches that repeat each other."""

from __future__ import annotations

import pytest
import torch

from diffcache.executor.prediction import repeats, repetition

pytestmark = pytest.mark.fast


def test_repetition() -> None:
    x = torch.randn(1, 3, 4, 6, 6)
    other = torch.randn(1, 3, 4, 6, 6)
    assert repetition([torch.cat([x, x])], 2) is True
    assert repetition([torch.cat([x, other])], 2) is False
    assert repetition([torch.cat([torch.cat([x, x]), torch.cat([x, other])], 2)], 2) is None
    assert repetition([x], 2) is False
    assert repetition([], 2) is False


def test_batched_guidance_is_recognised_though_the_condition_channels_differ() -> None:
    """InstructPix2Pix puts the picture behind the latents of one branch and zeros behind those of the other."""
    latents, picture = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6)
    guided = torch.cat([torch.cat([latents] * 2), torch.cat([picture, torch.zeros_like(picture)])], dim=1)
    assert repeats([guided], 2)
    assert not repeats([torch.randn(2, 8, 6, 6)], 2)
    assert not repeats([guided], 3)
    samples = [torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6)]
    assert repeats([*samples, *(s.clone() for s in samples)], 2)
    assert not repeats([samples[0], samples[0], samples[1], samples[1]], 2)
    assert not repeats([], 2)
