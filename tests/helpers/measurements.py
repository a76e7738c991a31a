"""Profiles of a small guided loop, measured at every kind of site, for tests of schedulers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from documents import DIGEST, site

from diffcache.documents import DenoiserProfile, Dynamics, Guidance, NoiseSchedulerId, Profile, SiteProfile

STEPS, SAMPLES, WIDTH = 16, 3, 12
STACKS = ("transformer_blocks", "single_transformer_blocks")
# Schedulers that cannot plan from a profile alone, and why.
ROUTER = "it reads a trained router from a file"
NEEDS_MORE: dict[str, str] = {"harmonica": ROUTER, "learning_to_cache": ROUTER}


def trajectory(seed: int, steps: int = STEPS, branches: int = 2) -> np.ndarray:
    """[B, T, WIDTH]: outputs that turn smoothly, faster at both ends."""
    draw = np.random.default_rng(seed)
    time = np.linspace(-1, 1, steps)
    waves = np.stack([np.ones(steps), time, time**3, np.sin(2 * time), np.cos(3 * time), np.sin(7 * time) / 4])
    return np.einsum("bcw,wt->btc", draw.normal(size=(branches, WIDTH, len(waves))), waves)


def names(double: int = 2, single: int = 11) -> list[str]:
    """Two lists of blocks; the second is long enough for its names to be out of order as text."""
    found = ["model", "stack:transformer_blocks", "stack:single_transformer_blocks"]
    for stack, count, parts in (
        ("transformer_blocks", double, "attn ff"),
        ("single_transformer_blocks", single, "attn"),
    ):
        for i in range(count):
            found += [f"block:{stack}.{i}", *(f"sublayer:{stack}.{i}.{part}" for part in parts.split())]
    return found


def costs(name: str) -> dict[str, Any]:
    """Sites take most of the time of what is around them, a feed-forward twice that of the attention in its block."""
    kind = name.partition(":")[0]
    part = 0.9 if STACKS[1] in name else 0.6 if name.endswith("ff") else 0.3
    milliseconds = {"model": 70, "stack": 5.1 * (11 if STACKS[1] in name else 2), "block": 5, "sublayer": 5 * part}[
        kind
    ]
    return {"seconds": milliseconds / 1000, "output_bytes": 4096 if kind == "model" else 1 << 16}


def measurement(
    steps: int = STEPS, seed: int = 0, sites: Mapping[str, SiteProfile] | None = None, **changes: Any
) -> Profile:
    """A loop of Euler steps with guidance, measured at every kind of site."""
    sigmas = np.linspace(1, 0, steps + 1) ** 1.2
    handed = np.stack([trajectory(99 + n, steps, 1)[0] for n in range(SAMPLES)])
    fields: dict[str, Any] = {
        "steps": steps,
        "timesteps": 1000 * sigmas[:-1],
        "sigmas": sigmas,
        "denoisers": {
            "transformer": DenoiserProfile(
                class_name="Net",
                config_digest=DIGEST,
                sites=sites or {n: site(trajectory(seed + i, steps), **costs(n)) for i, n in enumerate(names())},
            )
        },
        "noise_scheduler": NoiseSchedulerId(class_name="FlowMatchEulerDiscreteScheduler", config_digest=DIGEST),
        "guidance": Guidance(mode="batched", branches=2, scales={"guidance_scale": 4.0}),
        "dynamics": Dynamics(
            grams=handed @ handed.transpose(0, 2, 1) / WIDTH,
            peaks=np.full(SAMPLES, 4.0),
            reach=np.tril(np.broadcast_to(np.diff(sigmas), (steps, steps))),
            response=np.linspace(-0.1, 0.5, steps),
            spread=np.linspace(0.2, 0.1, steps),
        ),
        "seconds": 0.1 * steps,
        "samples": SAMPLES,
    }
    return Profile(**fields | changes)


def each_site(found: Profile, **changes: Any) -> Profile:
    """The profile with these fields changed at all of its sites."""
    denoiser = found.denoisers["transformer"]
    changed = {n: dataclasses.replace(s, **changes) for n, s in denoiser.sites.items()}
    return dataclasses.replace(found, denoisers={"transformer": dataclasses.replace(denoiser, sites=changed)})


def only(found: Profile, *kinds: str) -> Profile:
    """The profile with the sites of these granularities."""
    denoiser = found.denoisers["transformer"]
    left = {n: s for n, s in denoiser.sites.items() if n.partition(":")[0] in kinds}
    return dataclasses.replace(found, denoisers={"transformer": dataclasses.replace(denoiser, sites=left)})
