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

from diffcache.profile import DenoiserProfile, Dynamics, Profile, SiteProfile
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
        "start": 3,
        "timesteps": np.linspace(999, 1, STEPS),
        "sigmas": np.linspace(1, 0, STEPS + 1),
        "denoisers": {
            "unet": DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": tables(outputs)})
        },
        "noise_scheduler": NoiseSchedulerId(class_name="Euler", config_digest=DIGEST, prediction_type="epsilon"),
        "guidance": Guidance(mode="separate", branches=2, scale=7.5),
        "dynamics": dynamics(changes.get("steps", STEPS)),
        "samples": 16,
        "provenance": {"prompts": "sixteen"},
    }
    return Profile(**fields | changes)


def dynamics(steps: int = STEPS, **changes: np.ndarray) -> Dynamics:
    """A sampler of equal steps, and outputs that turn slowly."""
    angle = np.linspace(0, 1, steps)
    fields = {
        "gram": np.cos(angle[:, None] - angle),
        "reach": np.tril(np.full((steps, steps), -1 / steps)),
        "response": np.linspace(0.5, 0.25, steps),
    }
    return Dynamics(**fields | changes)


def measured(site: SiteProfile) -> DenoiserProfile:
    return DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": site})


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
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    edit(tree, arrays)
    path.write_bytes(save(arrays, metadata={"diffcache": json.dumps(tree)}))
    return path


finite = st.floats(allow_nan=False, allow_infinity=False)
letters = st.characters(exclude_categories=["Cs"])  # no lone surrogates
names = st.text(letters, min_size=1, max_size=8)
provenances = st.dictionaries(names, st.text(letters, max_size=8), max_size=3)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
paths = st.from_regex(r"[A-Za-z0-9_-]{1,4}(\.[A-Za-z0-9_-]{1,4}){0,2}", fullmatch=True)
site_names = st.just("model") | st.builds("{}:{}".format, st.sampled_from(["stack", "block", "sublayer"]), paths)
noise_schedulers = st.builds(
    NoiseSchedulerId, class_name=names, config_digest=digests, prediction_type=st.none() | names
)
guidances = st.builds(
    lambda mode, branches, scale: Guidance(mode=mode, branches=1 if mode == "none" else branches, scale=scale),
    st.sampled_from(["none", "separate", "batched"]),
    st.integers(2, 3),
    st.none() | finite,
)


def arrays(*shape: int, elements: st.SearchStrategy[float] = finite) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=elements)


@st.composite
def site_plans(draw: st.DrawFn, compute: np.ndarray, branches: list[int]) -> SitePlan:
    branch, step, anchor = draw(st.sampled_from(branches)), len(compute), draw(st.integers(1, 3))
    weights = draw(arrays(branch, step, anchor))
    exists = np.arange(anchor) < np.cumsum(compute)[:, None]
    weights = np.where(exists & ~compute[:, None], weights, 0)
    weights[:, :, 0] = np.where(~compute & (weights[:, :, 0] == 0), 1, weights[:, :, 0])
    per_channel = st.sampled_from([(branch, step), (branch, step, 2)])
    return SitePlan(
        compute=compute,
        weights=weights,
        kappa=draw(st.none() | arrays(branch, step)),
        scale=draw(st.none() | per_channel.flatmap(lambda s: arrays(*s, elements=st.floats(0.5, 2)))),
        bias=draw(st.none() | per_channel.flatmap(lambda s: arrays(*s))),
    )


@st.composite
def denoiser_plans(draw: st.DrawFn, steps: int, branches: list[int]) -> DenoiserPlan:
    depth = ["model", "stack", "block", "sublayer"]
    compute, sites = np.ones(steps, bool), {}
    for name in sorted(
        draw(st.sets(site_names, min_size=1, max_size=3)), key=lambda n: depth.index(n.partition(":")[0])
    ):
        compute = compute & draw(hnp.arrays(bool, steps))  # what lies inside a predicted site does not run
        compute[0] = True
        sites[name] = draw(site_plans(compute, branches))
    return DenoiserPlan(sites=sites, class_name=draw(st.none() | names), config_digest=draw(st.none() | digests))


@st.composite
def schedules(draw: st.DrawFn) -> CacheSchedule:
    """Any valid schedule, small."""
    steps, guidance = draw(st.integers(1, 6)), draw(st.none() | guidances)
    branches = [1, guidance.branches] if guidance else [1]
    return CacheSchedule(
        steps=steps,
        denoisers=draw(st.dictionaries(paths, denoiser_plans(steps, branches), min_size=1, max_size=2)),
        noise_scheduler=draw(st.none() | noise_schedulers),
        guidance=guidance,
        timesteps=draw(st.none() | arrays(steps)),
        provenance=draw(provenances),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any valid profile, small."""
    steps, guidance = draw(st.integers(1, 4)), draw(st.none() | guidances)
    branches = [1, guidance.branches] if guidance else [1]
    outputs = st.sampled_from(branches).flatmap(lambda b: arrays(b, steps, 3, elements=st.floats(0.5, 2)))
    costs = st.fixed_dictionaries(
        {"seconds": st.floats(0, 1e6), "flops": st.integers(0, 2**63 - 1), "output_bytes": st.integers(0, 2**63 - 1)},
        optional={"cosine": st.none()},
    )
    site_profiles = st.builds(lambda o, c: tables(o, **c), outputs, costs)
    denoisers = st.builds(
        DenoiserProfile,
        class_name=names,
        config_digest=st.none() | digests,
        sites=st.dictionaries(site_names, site_profiles, min_size=1, max_size=2),
    )
    outputs_of_loop = draw(arrays(steps, 3, elements=st.floats(0.5, 2)))
    loops = st.builds(
        lambda reach, response: Dynamics(
            gram=outputs_of_loop @ outputs_of_loop.T, reach=np.tril(reach), response=response
        ),
        arrays(steps, steps),
        arrays(steps),
    )
    return Profile(
        steps=steps,
        start=draw(st.integers(0, 9)),
        timesteps=draw(arrays(steps)),
        sigmas=draw(st.none() | arrays(steps + 1, elements=st.floats(0, 1e6))),
        denoisers=draw(st.dictionaries(paths, denoisers, min_size=1, max_size=2)),
        noise_scheduler=draw(st.none() | noise_schedulers),
        guidance=guidance,
        dynamics=draw(st.none() | loops),
        samples=draw(st.integers(1, 10**6)),
        provenance=draw(provenances),
    )
