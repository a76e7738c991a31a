"""Documents to test with: one of each kind with every field filled in, any valid one (hypothesis), and forgeries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save

from diffcache.profile import DenoiserProfile, Profile, SiteProfile
from diffcache.schedule import CacheSchedule, DenoiserPlan, Guidance, NoiseSchedulerId, SitePlan

DIGEST = "0123456789abcdef" * 4
STEPS = 6

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]
Edit = Callable[[Tree, Arrays], object]


def mask(text: str) -> np.ndarray:
    """``"■·■"`` -> bool [3]."""
    return np.array([letter == "■" for letter in text])


def hold(text: str, *, branches: int = 1, **more: np.ndarray) -> SitePlan:
    """Reuse the newest output wherever ``text`` says ``·``."""
    weights = np.where(mask(text), 0.0, 1.0)[None, :, None].repeat(branches, axis=0)
    return SitePlan(compute=mask(text), weights=weights, **more)


def schedule(**changes: Any) -> CacheSchedule:
    """Two sites, two branches, six steps; nothing left at its default."""
    weights = np.zeros((2, STEPS, 2))
    weights[0, 2] = weights[0, 4:] = [1.5, -0.5]
    weights[1, [2, 4, 5], 0] = 1
    full = SitePlan(
        compute=mask("■■·■··"),
        weights=weights,
        kappa=np.full((2, STEPS), 0.25),
        scale=np.full((2, STEPS), 0.5),
        bias=np.full((2, STEPS, 3), -0.125),
    )
    sites = {"model": full, "block:blocks.0": hold("■·····")}
    fields: dict[str, Any] = {
        "steps": STEPS,
        "denoisers": {"transformer": DenoiserPlan(sites=sites, class_name="Net", config_digest=DIGEST)},
        "noise_scheduler": NoiseSchedulerId(class_name="Euler", config_digest=DIGEST, prediction_type="epsilon"),
        "guidance": Guidance(mode="batched", branches=2, scale=5.0),
        "timesteps": np.linspace(999, 1, STEPS),
        "provenance": {"scheduler": "by hand"},
    }
    return CacheSchedule(**fields | changes)


def profile(**changes: Any) -> Profile:
    """Two branches of one site, six steps; nothing left at its default."""
    outputs = np.random.default_rng(0).normal(size=(2, STEPS, 8)).cumsum(axis=1)
    fields: dict[str, Any] = {
        "steps": STEPS,
        "timesteps": np.linspace(999, 1, STEPS),
        "sigmas": np.linspace(1, 0, STEPS + 1),
        "denoisers": {"unet": DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": tables(outputs)})},
        "noise_scheduler": NoiseSchedulerId(class_name="Euler", config_digest=DIGEST, prediction_type="epsilon"),
        "guidance": Guidance(mode="separate", branches=2, scale=7.5),
        "samples": 16,
        "provenance": {"prompts": "sixteen"},
    }
    return Profile(**fields | changes)


def tables(outputs: np.ndarray, **changes: Any) -> SiteProfile:
    """What a profile says about the outputs [B, T, C] of a site."""
    size = np.linalg.norm(outputs, axis=-1)
    inner = np.einsum("bic,bjc->bij", outputs, outputs)
    fields: dict[str, Any] = {
        "distance": np.linalg.norm(outputs[:, :, None] - outputs[:, None], axis=-1) / size[:, None, :],
        "gram": inner / outputs.shape[-1],
        "cosine": np.clip(inner / (size[:, :, None] * size[:, None, :]), -1, 1),
        "seconds": 0.004,
        "flops": 3 * 10**9,
        "output_bytes": 4096,
    }
    return SiteProfile(**fields | changes)


def forge(document: CacheSchedule | Profile, path: Path, edit: Edit) -> Path:
    """The file of ``document`` with its JSON and tensors changed by ``edit``, written without this library."""
    document.save(path)
    with safe_open(path, framework="numpy") as file:
        tree = json.loads(file.metadata()["diffcache"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    edit(tree, arrays)
    path.write_bytes(save(arrays, metadata={"diffcache": json.dumps(tree)}))
    return path


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = st.text(texts, min_size=1) if False else st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
parts = st.from_regex(r"[A-Za-z0-9_-]{1,4}(\.[A-Za-z0-9_-]{1,4}){0,2}", fullmatch=True)
noise_schedulers = st.builds(
    NoiseSchedulerId, class_name=names, config_digest=digests, prediction_type=st.none() | names
)
guidances = st.builds(Guidance, mode=st.just("none"), branches=st.just(1), scale=st.none() | finite) | st.builds(
    Guidance, mode=st.sampled_from(["separate", "batched"]), branches=st.integers(2, 3), scale=st.none() | finite
)
provenances = st.dictionaries(names, texts, max_size=3)
site_names = st.just("model") | st.builds("{}:{}".format, st.sampled_from(["stack", "block", "sublayer"]), parts)
