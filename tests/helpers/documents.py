"""Documents to test with: one of each kind with every field filled in, any valid one (hypothesis), and forgeries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save

from diffcache.documents import (
    CacheSchedule,
    DenoiserPlan,
    DenoiserProfile,
    DriftTables,
    Dynamics,
    Expected,
    Guidance,
    KeptProfile,
    NoiseSchedulerId,
    Online,
    Profile,
    ScheduleSet,
    SitePlan,
    SiteProfile,
    StoreFormat,
    Tables,
    TokenExpected,
    TokenProfile,
    TokenSchedule,
)
from diffcache.documents.checks import MOST
from diffcache.errors import DiffCacheError, DocumentError

DIGEST = "0123456789abcdef" * 4
STEPS = 6
RULES = ("first_block", "modulated_input", "output_rate", "drift", "time_embedding")

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
        inputs=weights * -0.75,
        scale=np.full((2, STEPS), 0.5),
        bias=np.full((2, STEPS, 3), -0.125),
        store="int8",
        prescale=np.array([[0.5, -2.0, 0.0], [1.0, 3.0, 0.25]]),
    )
    sites = {"model": full, "block:blocks.0": hold("■·····")}
    plan = DenoiserPlan(sites=sites, online=online(), called=mask("·■■■■■"), class_name="Net", config_digest=DIGEST)
    fields: dict[str, Any] = {
        "steps": STEPS,
        "denoisers": {"transformer": plan},
        "noise_scheduler": NoiseSchedulerId(class_name="Euler", config_digest=DIGEST, prediction_type="epsilon"),
        "guidance": Guidance(mode="batched", branches=2, scales={"guidance_scale": 5.0}),
        "timesteps": np.linspace(999, 1, STEPS),
        "sigmas": np.linspace(1, 0, STEPS + 1),
        "expected": Expected(mean_db=40.0, low_db=35.5, high_db=44.0, samples=16, origin="held-out"),
        "provenance": {"scheduler": "by hand"},
    }
    return CacheSchedule(**fields | changes)


def online(**changes: Any) -> Online:
    """A guard against drift, the only rule that plans with several anchors may have."""
    fields: dict[str, Any] = {
        "rule": "drift",
        "limit": np.linspace(0.5, 0.25, STEPS),
        "polynomial": np.array([2.0, -1.0]),
        "most": 3,
        "options": {"gamma": 0.5, "norm": "l1"},
    }
    return Online(**fields | changes)


def profile(**changes: Any) -> Profile:
    """Two branches of one site, six steps or as many as ``changes`` say; nothing left at its default."""
    steps = changes.get("steps", STEPS)
    outputs = np.random.default_rng(0).normal(size=(2, steps, 8)).cumsum(axis=1)
    fields: dict[str, Any] = {
        "steps": steps,
        "start": 3,
        "after": 0,
        "timesteps": np.linspace(999, 1, steps),
        "sigmas": np.linspace(1, 0, steps + 1),
        "denoisers": {"unet": DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": site(outputs)})},
        "noise_scheduler": NoiseSchedulerId(class_name="Euler", config_digest=DIGEST, prediction_type="epsilon"),
        "guidance": Guidance(mode="separate", branches=2, scales={"guidance_scale": 7.5}),
        "dynamics": dynamics(steps),
        "seconds": 0.03,
        "samples": 16,
        "provenance": {"prompts": "sixteen"},
    }
    return Profile(**fields | changes)


def of_sites(sites: dict[str, SiteProfile], **changes: Any) -> Profile:
    """Return a profile of one denoiser with these sites; without guidance and dynamics, measured from step 0."""
    fields: dict[str, Any] = {
        "steps": next(iter(sites.values())).output.gram.shape[1],
        "start": 0,
        "after": 0,
        "guidance": None,
        "dynamics": None,
        "denoisers": {"transformer": DenoiserProfile(class_name="Net", config_digest=DIGEST, sites=sites)},
    }
    return profile(**fields | changes)


def of_outputs(outputs: dict[str, np.ndarray], **changes: Any) -> Profile:
    """Return a profile of sites with these outputs [B, T, C]."""
    return of_sites({name: site(found) for name, found in outputs.items()}, **changes)


def dynamics(steps: int = STEPS, **changes: np.ndarray) -> Dynamics:
    """A sampler of equal steps, and outputs that turn slowly, faster in the second of two samples."""
    angle = np.linspace(0, 1, steps)
    turn = angle[:, None] - angle
    fields = {
        "grams": np.cos([turn, 2 * turn]),
        "peaks": np.array([2.0, 3.0]),
        "reach": np.tril(np.full((steps, steps), -1 / steps)),
        "response": np.linspace(0.5, 0.25, steps),
        "spread": np.linspace(0.1, 0.4, steps),
    }
    return Dynamics(**fields | changes)


def measured(found: SiteProfile) -> DenoiserProfile:
    return DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": found})


def site(outputs: np.ndarray, **changes: Any) -> SiteProfile:
    """What a profile says about a site with the outputs [B, T, C]: its input stands still, so the residual moves as the
    output does."""
    rows = outputs.shape[:2]
    residuals = outputs - 1
    length = np.maximum(np.linalg.norm(residuals, axis=-1), 1e-9)
    fields: dict[str, Any] = {
        "output": tables(outputs),
        "residual": tables(residuals),
        "residual_ratio": np.concatenate([np.ones_like(length[:, :1]), length[:, 1:] / length[:, :-1]], axis=1),
        "input_change": np.full(rows, 0.25),
        "modulated_change": np.full(rows, 0.125),
        "influence": np.linspace(1, 0.5, rows[1]),
        "seconds": 0.004,
        "flops": 3 * 10**9,
        "calls": 1,
        "output_bytes": 4096,
        "kept": {"int8": KeptProfile(bytes=1056, error=1e-4), "int4": KeptProfile(bytes=544, error=1e-2)},
        "channels": np.array([[0.0, -1.5], [1.0, 2.5]]),
    }
    return SiteProfile(**fields | changes)


def tables(tensors: np.ndarray, **changes: np.ndarray) -> Tables:
    """Of the tensors [B, T, C]."""
    l1 = np.abs(tensors[:, :, None] - tensors[:, None]).mean(-1)
    size = np.maximum(np.abs(tensors).mean(-1), 1e-9)
    gram = np.einsum("bic,bjc->bij", tensors, tensors) / tensors.shape[-1]
    return Tables(**{"l1": l1, "relative_l1": l1 / size[:, None, :], "gram": gram} | changes)


def forge(document: CacheSchedule | ScheduleSet | Profile, path: Path, edit: Edit) -> Path:
    """The file of ``document`` with its JSON and tensors changed by ``edit``, written without this library."""
    document.save(path)
    with safe_open(path, framework="numpy") as file:
        tree = json.loads(file.metadata()["diffcache"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    edit(tree, arrays)
    path.write_bytes(save(arrays, metadata={"diffcache": json.dumps(tree)}))
    return path


finite = st.floats(allow_nan=False, allow_infinity=False)
coefficients = st.floats(-MOST, MOST)
letters = st.characters(exclude_categories=["Cs"])  # no lone surrogates
names = st.text(letters, min_size=1, max_size=8)
option_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
provenances = st.dictionaries(names, st.text(letters, max_size=8), max_size=3)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
paths = st.from_regex(r"[A-Za-z0-9_-]{1,4}(\.[A-Za-z0-9_-]{1,4}){0,2}", fullmatch=True)
site_names = st.just("model") | st.builds("{}:{}".format, st.sampled_from(["stack", "block", "sublayer"]), paths)
noise_schedulers = st.builds(
    NoiseSchedulerId, class_name=names, config_digest=digests, prediction_type=st.none() | names
)
guidances = st.builds(
    lambda mode, branches, scales: Guidance(mode=mode, branches=1 if mode == "none" else branches, scales=scales),
    st.sampled_from(["none", "separate", "batched"]),
    st.integers(2, 3),
    st.dictionaries(names, finite, max_size=2),
)
expectations = st.builds(
    lambda mean, ends, samples, origin: Expected(
        mean_db=mean, low_db=min(ends), high_db=max(ends), samples=samples, origin=origin
    ),
    finite,
    st.tuples(finite, finite),
    st.integers(1, 10**6),
    st.sampled_from(["simulated", "calibration", "held-out"]),
)


def arrays(*shape: int, elements: st.SearchStrategy[float] = finite) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=elements)


kept_profiles = st.builds(KeptProfile, bytes=st.integers(0, 2**63 - 1), error=st.floats(0, 1e9))
channels = st.integers(1, 3).flatmap(lambda c: arrays(2, c, elements=st.floats(0.5, 2)))


@st.composite
def site_plans(draw: st.DrawFn, compute: np.ndarray, branches: list[int]) -> SitePlan:
    branch, step, anchor = draw(st.sampled_from(branches)), len(compute), draw(st.integers(1, 3))
    weights = draw(arrays(branch, step, anchor, elements=coefficients))
    exists = np.arange(anchor) < np.cumsum(compute)[:, None]
    weights = np.where(exists & ~compute[:, None], weights, 0)
    weights[:, :, 0] = np.where(~compute & (weights[:, :, 0] == 0), 1, weights[:, :, 0])
    per_channel = st.sampled_from([(branch, step), (branch, step, 2)])
    return SitePlan(
        compute=compute,
        weights=weights,
        kappa=draw(st.none() | arrays(branch, step, elements=coefficients)),
        inputs=draw(st.none() | st.just(weights * -0.5)),
        scale=draw(st.none() | per_channel.flatmap(lambda s: arrays(*s, elements=st.floats(0.5, 2)))),
        bias=draw(st.none() | per_channel.flatmap(lambda s: arrays(*s, elements=coefficients))),
        store=draw(st.none() | st.sampled_from(get_args(StoreFormat))),
        prescale=draw(st.none() | channels),
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
    several = any(plan.anchors > 1 for plan in sites.values())
    return DenoiserPlan(
        sites=sites,
        called=draw(st.none() | hnp.arrays(bool, steps).filter(np.any)),
        online=draw(st.none() | onlines(steps, ["drift"] if several else list(RULES))),
        class_name=draw(st.none() | names),
        config_digest=draw(st.none() | digests),
    )


def onlines(steps: int, rules: list[str]) -> st.SearchStrategy[Online]:
    return st.builds(
        Online,
        rule=st.sampled_from(rules),
        limit=arrays(steps, elements=st.floats(0, 1e9)),
        polynomial=st.none() | st.integers(1, 4).flatmap(arrays),
        most=st.none() | st.integers(1, 9),
        options=st.dictionaries(option_names, st.integers(-(2**53), 2**53) | finite | names, max_size=2),
    )


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
        sigmas=draw(st.none() | arrays(steps + 1, elements=st.floats(0, 1e6)).map(lambda s: np.sort(s)[::-1].copy())),
        expected=draw(st.none() | expectations),
        provenance=draw(provenances),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any valid profile, small."""
    steps, guidance = draw(st.integers(1, 4)), draw(st.none() | guidances)
    branches = [1, guidance.branches] if guidance else [1]
    outputs = st.sampled_from(branches).flatmap(lambda b: arrays(b, steps, 3, elements=st.floats(0.5, 2)))
    changes = st.fixed_dictionaries(
        {
            "seconds": st.floats(0, 1e6),
            "flops": st.integers(0, 2**63 - 1),
            "calls": st.integers(1, 2**63 - 1),
            "output_bytes": st.integers(0, 2**63 - 1),
        },
        optional={
            "modulated_change": st.none(),
            "influence": st.none() | arrays(steps, elements=st.floats(0, 1e9)),
            "kept": st.dictionaries(st.sampled_from(get_args(StoreFormat)), kept_profiles),
            "channels": st.none() | channels,
        },
    )
    no_residual = st.sampled_from([{}, {"residual": None, "residual_ratio": None}])
    denoisers = st.builds(
        DenoiserProfile,
        class_name=names,
        config_digest=st.none() | digests,
        sites=st.dictionaries(
            site_names,
            st.builds(lambda o, c, r: site(o, **c, **r), outputs, changes, no_residual),
            min_size=1,
            max_size=2,
        ),
    )
    samples = draw(st.integers(1, 2))
    of_loop = draw(arrays(samples, steps, 3, elements=st.floats(0.5, 2)))
    loops = st.builds(
        lambda reach, response, spread, peaks: Dynamics(
            grams=of_loop @ of_loop.transpose(0, 2, 1),
            peaks=peaks,
            reach=np.tril(reach),
            response=response,
            spread=spread,
        ),
        arrays(steps, steps),
        arrays(steps),
        arrays(steps, elements=st.floats(0, 1e9)),
        arrays(samples, elements=st.floats(0, 1e9)),
    )
    return Profile(
        steps=steps,
        start=draw(st.integers(0, 9)),
        after=draw(st.integers(0, 9)),
        timesteps=draw(arrays(steps)),
        sigmas=draw(st.none() | arrays(steps + 1, elements=st.floats(0, 1e6))),
        denoisers=draw(st.dictionaries(paths, denoisers, min_size=1, max_size=2)),
        noise_scheduler=draw(st.none() | noise_schedulers),
        guidance=guidance,
        dynamics=draw(st.none() | loops),
        seconds=draw(st.floats(0, 1e6)),
        samples=draw(st.integers(1, 10**6)),
        provenance=draw(provenances),
    )


def refused(kind: type[CacheSchedule] | type[Profile], path: Path, field: str, *words: str) -> str:
    """The words of the one error, after checking that all its parts are there."""
    with pytest.raises(DocumentError) as caught:
        kind.load(path)
    message = str(caught.value)
    assert isinstance(caught.value, DiffCacheError)
    assert message.startswith(f"{path}: field {field!r}: ")
    assert "Allowed: " in message
    for word in words:
        assert word in message
    assert len(message) < 1000  # the message fits on a screen for any content of the file
    return message


def drift_tables(positions: int) -> DriftTables:
    """Return tables with a drift that falls off with the distance."""
    near = np.exp(-np.abs(np.arange(-positions + 1, positions)) / 4)
    return DriftTables(masked=0.1 * near, decoded=0.05 * near, next=np.full(positions, 0.1))


def token_profile(**changes: Any) -> TokenProfile:
    """Return a profile of four sequences of 40 positions, with one commit in each forward and 32 masks."""
    size, masks, layers = 40, 32, 3
    rng = np.random.default_rng(0)
    committed = np.zeros((4, size))
    committed[:, size - masks :] = [1 + rng.permutation(masks) for _ in range(4)]
    counts = np.array([4.0, size])
    fields: dict[str, Any] = {
        "class_name": "Network",
        "layers": layers,
        "forwards": float(masks),
        "drift": drift_tables(size),
        "ages": np.array([0, 0.03, 0.06, 0.12, 0.25]),
        "errors": np.array([[0, 0.01, 0.02, 0.05, 0.09], [0, 0.03, 0.05, 0.06, 0.07], [0, 0.02, 0.02, 0.09, 0.1]]),
        "changes": np.full((layers, 3, 5), 0.1),
        "counts": counts,
        "seconds": counts / size,
        "outside": 0.0,
        "committed": committed,
        "margins": np.full((4, size), 0.9),
        "flip_rate": 0.5,
        "provenance": {"calls": "2"},
    }
    return TokenProfile(**fields | changes)


def token_schedule(**changes: Any) -> TokenSchedule:
    """Return a schedule of four parts with one refresh."""
    fields: dict[str, Any] = {
        "class_name": "LlamaForCausalLM",
        "layers": 3,
        "positions": 40,
        "fresh": 4,
        "weight": 0.0,
        "drift": drift_tables(40),
        "starts": np.array([0.0, 3, 0, 3]),
        "expected": TokenExpected(answers=8, same_tokens=0.99, same_answers=0.75, speedup=3.0, flips=0.01),
        "provenance": {"made by": "optimize"},
    }
    return TokenSchedule(**fields | changes)
