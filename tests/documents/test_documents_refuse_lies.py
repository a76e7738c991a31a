"""One case per way in which a file can lie: each is refused with one error, and nothing in the file is run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import DIGEST, STEPS, Arrays, Tree, forge, profile, refused, schedule, token_profile, token_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.documents import (
    CacheSchedule,
    DenoiserPlan,
    DenoiserProfile,
    Dynamics,
    Expected,
    Guidance,
    KeptProfile,
    NoiseSchedulerId,
    Online,
    Profile,
    SitePlan,
    SiteProfile,
    Tables,
)
from diffcache.errors import DocumentError

pytestmark = pytest.mark.fast

MODEL = "transformer/model"
BLOCK = "transformer/block:blocks.0"
ONLINE = "transformer/online"
SITE = "unet/model"
VALID = schedule().to_bytes()


# Descriptions and tensors that are not what they should be. An edit is of the field that the error will name, or ``at``
# another, where only the contradiction between the two is a lie.

Lie = Callable[[Tree, Arrays, str], object]


def find(tree: Tree, field: str) -> tuple[Tree, str]:
    """The object that has ``field``, as errors call it, and its key there."""
    *way, last = field.split("/")
    for key in way:
        tree = around(tree, key)[key]
    return around(tree, last), last


def around(tree: Tree, key: str) -> Tree:
    return next((tree[room] for room in ("denoisers", "sites", "kept") if key in tree.get(room, {})), tree)


def put(value: Any, at: str = "") -> Lie:
    def edit(tree: Tree, _: Arrays, field: str) -> None:
        here, key = find(tree, at or field)
        here[key] = value

    return edit


def drop(tree: Tree, _: Arrays, field: str) -> None:
    here, key = find(tree, field)
    del here[key]


def lose(_: Tree, arrays: Arrays, field: str) -> None:
    del arrays[field]


def entry(index: Any, value: float) -> Lie:
    def edit(_: Tree, arrays: Arrays, field: str) -> None:
        arrays[field][index] = value

    return edit


def change(how: Callable[[np.ndarray], np.ndarray], at: str = "") -> Lie:
    def edit(_: Tree, arrays: Arrays, field: str) -> None:
        arrays[at or field] = np.ascontiguousarray(how(arrays[at or field]))

    return edit


def lie(field: str, edit: Lie, *words: str) -> Any:
    return pytest.param(field, edit, words, id=f"{field}: {words[0]}")


SPARE = "a tensor that the document does not mention"
SCHEDULE_LIES = [
    lie(
        "format",
        put("diffcache.profile"),
        "found 'diffcache.profile'",
        "'diffcache.schedule', which CacheSchedule",
    ),
    lie("format", put(["diffcache.schedule"]), "found ['diffcache.schedule']"),
    lie("format", drop, "found None"),
    lie("version", put(4), "found 4. Allowed: 1, 2, 3", "needs a newer diffcache"),
    lie("version", put(True), "found True"),
    lie("version", put("1"), "found '1'"),
    lie("version", drop, "found None"),
    lie("library", drop, "missing or not text. Allowed: the version"),
    lie("library", put(1), "not text"),
    lie("steps", put(0), "found 0. Allowed: a whole number, at least 1"),
    lie("steps", put(6.0), "found 6.0"),
    lie("steps", put(True), "found True"),
    lie("steps", put(2**63), "below 2**63"),
    lie("steps", put({"a": "x" * 10**5}), "found {'a': 'xxx"),
    lie("timesteps", put(7, at="steps"), "found shape [6]. Allowed: [step 7]"),
    lie("timesteps", entry(3, np.inf), "step 3 is inf. Allowed: finite numbers"),
    lie("timesteps", put([1, 2, 3]), "found [1, 2, 3]. Allowed: 'tensor', which stands for the tensor 'timesteps'"),
    lie("timesteps", put(None), SPARE),
    lie("sigmas", change(lambda a: a[:-1]), "found shape [6]. Allowed: [step 7]"),
    lie("sigmas", entry(0, np.nan), "step 0 is nan. Allowed: finite numbers"),
    lie("sigmas", entry(3, 2), "step 2 is 0.666667, the one after it higher", "Allowed: noise levels that never rise"),
    lie("sigmas", entry(6, -1), "step 6 is -1", "the last below 0. Allowed: noise levels that never rise, 0 or more"),
    lie("sigmas", put(None), SPARE),
    lie("expected", put(40.0), "found 40.0. Allowed: an object"),
    lie("expected/mean_db", put("40"), "found '40'. Allowed: a finite number"),
    lie("expected/low_db", put(None), "found None. Allowed: a finite number"),
    lie("expected/high_db", put(True), "found True"),
    lie("expected/low_db", put(50.0), "found 50, above high_db 44. Allowed: low_db <= high_db"),
    lie("expected/samples", put(0), "found 0. Allowed: a whole number, at least 1"),
    lie("expected/origin", put("guessed"), "found 'guessed'. Allowed: 'simulated', 'calibration', 'held-out'"),
    lie("expected/origin", put({}), "found {}"),
    lie("transformer/online", put("drift"), "found 'drift'. Allowed: an object"),
    lie(f"{ONLINE}/limit", put(None, at="transformer/online"), SPARE),
    lie(f"{ONLINE}/options", put([]), "found []. Allowed: an object"),
    lie(f"{ONLINE}/options/gamma", put(None, at=f"{ONLINE}/options/gamma"), "found None. Allowed: a number or text"),
    lie(f"{ONLINE}/options", put({"a b": 1}), "found the name 'a b'. Allowed: letters, digits and '_'"),
    lie(f"{ONLINE}/options/gamma", put(2**53 + 1), "Allowed: a whole number from -2**53 to 2**53"),
    lie(f"{ONLINE}/options/gamma", put(True), "found True. Allowed: a number or text"),
    lie(f"{ONLINE}/rule", put(""), "found ''. Allowed: Unicode text, not empty"),
    lie(f"{ONLINE}/rule", put("../drift"), "found '../drift'. Allowed: a name of letters, digits and '_'"),
    lie(f"{ONLINE}/rule", put("os.path"), "found 'os.path'. Allowed: a name of letters"),
    lie(f"{ONLINE}/rule", put("a" * 257), "found 'aaaa", "up to 256 characters"),
    lie(f"{ONLINE}/rule", put("os:system:x"), "found 'os:system:x'. Allowed: a name of letters"),
    lie(
        f"{ONLINE}/rule",
        put("os:system"),
        "found 'os:system'. Allowed: the name of a criterion of diffcache; a file cannot name code to import",
    ),
    lie(f"{ONLINE}/rule", put(["drift"]), "found ['drift']"),
    lie(f"{ONLINE}/limit", put(0.1), "found 0.1. Allowed: 'tensor'"),
    lie(f"{ONLINE}/limit", entry(2, -0.1), "step 2 is -0.1. Allowed: 0 or more"),
    lie(f"{ONLINE}/limit", entry(2, np.inf), "step 2 is inf. Allowed: finite numbers"),
    lie(f"{ONLINE}/limit", change(lambda a: a[:5]), "5 steps. Allowed: 6, the steps of the schedule"),
    lie(f"{ONLINE}/polynomial", change(lambda a: a[:0]), "found shape [0]. Allowed: [power any]"),
    lie(f"{ONLINE}/polynomial", entry(1, np.nan), "power 1 is nan"),
    lie(f"{ONLINE}/most", put(0), "found 0. Allowed: a whole number, at least 1"),
    lie(f"{ONLINE}/most", put(2.0), "found 2.0"),
    lie("spare", lambda _, arrays, field: arrays.update({field: np.zeros(1)}), SPARE),
    lie("denoisers", put({}), "found none. Allowed: at least one"),
    lie("denoisers", put(["transformer"]), "found ['transformer']. Allowed: an object"),
    lie("transformer", put(None), "found None. Allowed: an object"),
    lie(
        "denoisers",
        lambda *file: rename(*file, "the net"),
        "found the name 'the net'. Allowed: up to 256 letters, digits",
    ),
    lie("denoisers", lambda *file: rename(*file, "net\n"), r"found the name 'net\n'"),
    lie("denoisers", lambda *file: rename(*file, "a..b"), "found the name 'a..b'"),
    lie("denoisers", lambda *file: rename(*file, "a" * 257), "found the name 'aaaa", "Allowed: up to 256 letters"),
    lie("denoisers", lambda *file: rename(*file, ""), "found ''"),
    lie("provenance", put("me"), "found 'me'. Allowed: an object"),
    lie("provenance", put({"": "x"}), "found ''. Allowed: Unicode text, not empty"),
    lie("provenance/seeds", put(16), "found int. Allowed: str"),
    lie("provenance/seeds", put("\ud800"), r"found '\ud800'. Allowed: Unicode text"),
    lie("noise_scheduler", put("Euler"), "found 'Euler'. Allowed: an object"),
    lie("noise_scheduler/class_name", put(""), "found ''"),
    lie("noise_scheduler/config_digest", put(None), "found None. Allowed: a sha256 digest"),
    lie("noise_scheduler/config_digest", put(DIGEST.upper()), "found '0123456789ABCD"),
    lie("noise_scheduler/prediction_type", put(3), "found 3"),
    lie("guidance", put(7.5), "found 7.5. Allowed: an object"),
    lie("guidance/mode", put("both"), "found 'both'. Allowed: 'none', 'separate', 'batched'"),
    lie("guidance/mode", put([]), "found []"),
    lie("guidance/branches", put(1), "found 1, mode 'batched'. Allowed: 1 with mode 'none', else 2 or more"),
    lie("guidance/branches", put("none", at="guidance/mode"), "found 2, mode 'none'"),
    lie("guidance/branches", put("2"), "found '2'"),
    lie("guidance/scales", put(5.0), "Allowed: an object"),
    lie("guidance/scales/guidance_scale", put("5"), "found str. Allowed: int or float"),
    lie("transformer/called", entry(slice(None), 0), "found no step. Allowed: at least one step, or null"),
    lie("transformer/called", change(lambda a: a[:5]), "5 steps. Allowed: 6, the steps of the schedule"),
    lie("transformer/called", entry(1, 2), "found the byte 2"),
    lie("transformer/called", put(None), SPARE),
    lie("transformer/class_name", put(""), "found ''. Allowed: Unicode text, not empty"),
    lie("transformer/class_name", put(["Net"]), "found ['Net']"),
    lie("transformer/config_digest", put("abc"), "found 'abc'. Allowed: a sha256 digest: 64 of the characters 0-9a-f"),
    lie("transformer/sites", put({}), "found none. Allowed: at least one"),
    lie("transformer/sites", put(3), "found 3. Allowed: an object"),
    lie("transformer/sites", lambda *file: move(*file, "attention:blocks.0"), "'attention:blocks.0'", "'stack:PATH'"),
    lie("transformer/sites", lambda *file: move(*file, "block:"), "found the site name 'block:'"),
    lie("transformer/sites", lambda *file: move(*file, "model:blocks"), "found the site name 'model:blocks'"),
    lie("transformer/sites", lambda *file: move(*file, "block:blocks[0]"), "found the name 'blocks[0]'"),
    lie(MODEL, put("tensor"), "found 'tensor'. Allowed: an object"),
    lie(f"{MODEL}/compute", put(None), "found None. Allowed: 'tensor', which stands for"),
    lie(f"{MODEL}/compute", lose, "the tensor is missing. Allowed: every tensor that the JSON mentions"),
    lie(f"{MODEL}/compute", change(lambda a: a.astype(np.float32)), "found dtype 'F32'. Allowed: U8 or F64"),
    lie(f"{MODEL}/compute", change(lambda a: a.astype(float)), "found a float64 array. Allowed: a numpy array of bool"),
    lie(f"{MODEL}/compute", change(lambda a: a[None]), "found shape [1, 6]. Allowed: [step any]"),
    lie(f"{MODEL}/compute", entry(1, 2), "found the byte 2. Allowed: 0 (predict) or 1 (compute)"),
    lie(f"{MODEL}/compute", entry(0, 0), "step 0 is predicted. Allowed: step 0 computed"),
    lie(f"{BLOCK}/compute", lambda *file: shorten(*file), "5 steps. Allowed: 6, the steps of the schedule"),
    lie(
        f"{BLOCK}/compute",
        lambda *file: compute_inside(*file),
        "step 2 is computed, but 'model' around it is predicted",
    ),
    lie(f"{MODEL}/weights", put("kappa"), "found 'kappa'. Allowed: 'tensor'"),
    lie(f"{MODEL}/weights", put(3, at="guidance/branches"), "2 branches. Allowed: 1, or the 3 of guidance"),
    lie(f"{MODEL}/weights", put(None, at="guidance"), "2 branches. Allowed: 1 without guidance", "Pass guidance="),
    lie(f"{MODEL}/weights", change(lambda a: a[:, :5]), "shape [2, 5, 2]. Allowed: [branch any, step 6, anchor any]"),
    lie(f"{MODEL}/weights", change(lambda a: a[:, :, :0]), "found shape [2, 6, 0]"),
    lie(f"{MODEL}/weights", change(lambda a: a[0]), "found shape [6, 2]"),
    lie(f"{MODEL}/weights", change(lambda a: a != 0), "found dtype 'BOOL'"),
    lie(f"{MODEL}/weights", entry((1, 4, 0), np.nan), "branch 1, step 4, anchor 0 is nan. Allowed: finite numbers"),
    lie(f"{MODEL}/weights", entry((0, 5, 1), -np.inf), "branch 0, step 5, anchor 1 is -inf"),
    *[
        lie(f"{MODEL}/{field}", entry(index, value), f"is {value:g}. Allowed: -1.67772e+07 to 1.67772e+07 (2**24)")
        for field, index, value in [
            ("weights", (1, 4, 0), 1e38),
            ("weights", (1, 4, 0), -2e7),
            ("kappa", (1, 4), 1e38),
            ("inputs", (1, 4, 0), 1e300),
            ("scale", (0, 5), -1e38),
            ("bias", (0, 5, 1), 1e38),
            ("prescale", (0, 1), 1e39),
            ("prescale", (1, 1), 1e39),
        ]
    ],
    lie(f"{MODEL}/prescale", entry((1, 0), 1e-39), "the spread of channel 0 is 1e-39. Allowed: spreads above 0"),
    lie(f"{MODEL}/weights", entry((1, 3, 0), 0.5), "branch 1, step 3, anchor 0 is 0.5 at a computed step. Allowed: 0"),
    lie(f"{BLOCK}/weights", lambda *file: reach_too_far(*file), "step 2, anchor 1 is 1, with 1 steps computed before"),
    lie(f"{BLOCK}/weights", entry((0, 3, 0), 0), "branch 0, step 3 is predicted, with all coefficients zero"),
    lie(f"{MODEL}/kappa", change(lambda a: a[:1]), "found shape [1, 6]. Allowed: [branch 2, step 6]"),
    lie(f"{MODEL}/kappa", entry((1, 2), np.nan), "branch 1, step 2 is nan"),
    lie(f"{MODEL}/kappa", lose, "the tensor is missing"),
    lie(f"{MODEL}/kappa", put(None), SPARE),
    lie(
        f"{MODEL}/inputs", change(lambda a: a[:, :, :1]), "found shape [2, 6, 1]. Allowed: [branch 2, step 6, anchor 2]"
    ),
    lie(f"{MODEL}/inputs", entry((1, 2, 0), np.inf), "branch 1, step 2, anchor 0 is inf"),
    lie(f"{MODEL}/inputs", entry((1, 1, 0), 1.0), "branch 1, step 1, anchor 0 is 1 at a computed step"),
    lie(f"{MODEL}/scale", change(lambda a: a[:, :-1]), "found shape [2, 5]. Allowed: [branch 2, step 6]"),
    lie(f"{MODEL}/scale", entry((0, 2), np.inf), "branch 0, step 2 is inf"),
    lie(f"{MODEL}/bias", change(lambda a: a[None]), "shape [1, 2, 6, 3]. Allowed: [branch 2, step 6, channel any]"),
    lie(f"{MODEL}/bias", entry((0, 2, 1), np.nan), "branch 0, step 2, channel 1 is nan"),
    lie(f"{MODEL}/store", put("int3"), "found 'int3'. Allowed: 'bf16', 'int8', 'fp8', 'int4' or null"),
    lie(f"{MODEL}/store", put(8), "found 8"),
    lie(f"{MODEL}/prescale", entry((1, 0), 0.0), "the spread of channel 0 is 0. Allowed: spreads above 0"),
    lie(f"{MODEL}/prescale", change(lambda a: a[:1]), "found shape [1, 3]. Allowed: [which 2, channel any]"),
    lie(f"{MODEL}/bias", change(lambda a: a[..., None].repeat(4, 2), at=f"{MODEL}/scale"), "[2, 6, 3]", "channel 4]"),
]

NO_GUIDANCE = {"mode": "none", "branches": 1, "scales": {}}
PROFILE_LIES = [
    lie(
        "format",
        put("diffcache.schedule"),
        "found 'diffcache.schedule'",
        "'diffcache.profile', which Profile reads",
    ),
    lie("version", put(0), "found 0. Allowed: 1, 2"),
    lie("steps", put(-1), "found -1. Allowed: a whole number, at least 1"),
    lie("samples", put(0), "found 0. Allowed: a whole number, at least 1"),
    lie("after", put(-1), "found -1. Allowed: a whole number, at least 0"),
    lie("start", put(-1), "found -1. Allowed: a whole number, at least 0"),
    lie("timesteps", put(None), "found None. Allowed: 'tensor'"),
    lie("timesteps", change(lambda a: a[:-1]), "found shape [5]. Allowed: [step 6]"),
    lie("sigmas", change(lambda a: a[:-1]), "found shape [6]. Allowed: [step 7]"),
    lie("sigmas", entry(6, -1), "step 6 is -1. Allowed: 0 or more"),
    lie("denoisers", put({}), "found none. Allowed: at least one"),
    lie("noise_scheduler/class_name", put(None), "found None"),
    lie("guidance/branches", put(0), "found 0"),
    lie("provenance", put([]), "found []"),
    lie("unet/class_name", put(None), "found None. Allowed: Unicode text, not empty"),
    lie("unet/config_digest", put(7), "found 7. Allowed: a sha256 digest"),
    lie("unet/sites", put(None), "found None. Allowed: an object"),
    lie("seconds", put(-1.0), "found -1.0. Allowed: a finite number, at least 0"),
    lie("seconds", put(None), "found None"),
    lie(f"{SITE}/seconds", put(-0.5), "found -0.5. Allowed: a finite number, at least 0"),
    lie(f"{SITE}/seconds", put("fast"), "found 'fast'"),
    lie(f"{SITE}/flops", put(1.5), "found 1.5. Allowed: a whole number, at least 0"),
    lie(f"{SITE}/calls", put(0), "found 0. Allowed: a whole number, at least 1"),
    lie(f"{SITE}/output_bytes", put(None), "found None"),
    lie(f"{SITE}/kept", put([]), "found []. Allowed: an object"),
    lie(
        f"{SITE}/kept/int3", put({"bytes": 3, "error": 0.0}), "found an unknown format. Allowed: bf16, int8, fp8, int4"
    ),
    lie(f"{SITE}/int8/bytes", put(-1), "found -1. Allowed: a whole number, at least 0"),
    lie(f"{SITE}/int8/error", put(-0.5), "found -0.5. Allowed: a finite number, at least 0"),
    lie(f"{SITE}/channels", entry((1, 1), 0.0), "which 1, channel 1 is 0. Allowed: spreads above 0"),
    lie(f"{SITE}/input_change", put(None), "found None. Allowed: 'tensor'"),
    lie(f"{SITE}/input_change", change(lambda a: a[:, 1:]), "found shape [2, 5]. Allowed: [branch 2, step 6]"),
    lie(f"{SITE}/input_change", entry((1, 4), -1), "branch 1, step 4 is -1. Allowed: 0 or more"),
    lie(f"{SITE}/modulated_change", change(lambda a: a[:1]), "found shape [1, 6]. Allowed: [branch 2, step 6]"),
    lie(f"{SITE}/modulated_change", entry((0, 1), -0.5), "branch 0, step 1 is -0.5. Allowed: 0 or more"),
    lie(f"{SITE}/modulated_change", put(None), SPARE),
    lie(f"{SITE}/influence", change(lambda a: a[None]), "found shape [1, 6]. Allowed: [step 6]"),
    lie(f"{SITE}/influence", entry(5, -1), "step 5 is -1. Allowed: 0 or more"),
    lie(f"{SITE}/influence", entry(5, np.nan), "step 5 is nan. Allowed: finite numbers"),
    lie(f"{SITE}/residual", put(0.5), "found 0.5. Allowed: an object"),
    lie(f"{SITE}/residual/l1", lambda _, arrays, __: branch_less(arrays), "shape [1, 6, 6]. Allowed: [2, 6, 6], as of"),
    lie(f"{SITE}/residual_ratio", lambda *file: without_residual(*file), "found without residual", "both or neither"),
    lie(f"{SITE}/residual_ratio", lambda *file: without_ratio(*file), "or residual without it. Allowed: both"),
    lie(f"{SITE}/residual_ratio", entry((1, 3), -2), "branch 1, step 3 is -2. Allowed: 0 or more"),
    lie(f"{SITE}/output", put(None), "found None. Allowed: an object"),
    lie(f"{SITE}/output", put(3), "found 3. Allowed: an object"),
    lie(f"{SITE}/output/l1", put(3, at="guidance/branches"), "2 branches. Allowed: 1, or the 3 of guidance"),
    lie(f"{SITE}/output/l1", put(NO_GUIDANCE, at="guidance"), "2 branches. Allowed: 1."),
    lie(f"{SITE}/output/l1", lambda _, arrays, __: step_less(arrays), "5 steps. Allowed: 6, the steps of the profile"),
    lie(f"{SITE}/output/l1", change(lambda a: a[:, :5]), "found shape [2, 5, 6]. Allowed: [branch 2, step 5, other 5]"),
    lie(f"{SITE}/output/l1", change(lambda a: a[0]), "found shape [6, 6]. Allowed: [branch any, step any, other any]"),
    lie(f"{SITE}/output/l1", entry((1, 2, 3), -0.1), "branch 1, step 2, other 3 is -0.1. Allowed: 0 or more"),
    lie(f"{SITE}/output/l1", entry((0, 4, 4), 0.1), "branch 0, step 4, other 4 is 0.1. Allowed: 0 on the diagonal"),
    lie(
        f"{SITE}/output/l1", entry((0, 1, 4), 99), "step 1, other 4 is 99, its mirror image", "Average them: (l1 + l1ᵀ)"
    ),
    lie(f"{SITE}/output/relative_l1", change(lambda a: a[:1]), "found shape [1, 6, 6]. Allowed: [branch 2, step 6"),
    lie(f"{SITE}/output/relative_l1", entry((1, 2, 3), -0.1), "branch 1, step 2, other 3 is -0.1. Allowed: 0 or more"),
    lie(f"{SITE}/output/relative_l1", entry((0, 4, 4), 0.1), "other 4 is 0.1. Allowed: 0 on the diagonal"),
    lie(f"{SITE}/output/relative_l1", entry((0, 1, 4), np.inf), "branch 0, step 1, other 4 is inf"),
    lie(f"{SITE}/output/gram", change(lambda a: a[:, :5, :5]), "shape [2, 5, 5]. Allowed: [branch 2, step 6, other 6]"),
    lie(f"{SITE}/output/gram", entry((0, 1, 4), 99), "step 1, other 4 is 99, its mirror image", "Average them: (gram"),
    lie(f"{SITE}/output/gram", change(lambda a: -np.eye(STEPS) * a), "step 0, other 0", "0 or more on the diagonal"),
    lie(
        f"{SITE}/residual/relative_l1", entry((1, 2, 3), -0.1), "branch 1, step 2, other 3 is -0.1. Allowed: 0 or more"
    ),
    lie("dynamics", put(0.5), "found 0.5. Allowed: an object"),
    lie("dynamics/grams", change(lambda a: a[:1]), "shape [1, 6, 6]. Allowed: [sample 2, step 6, other 6]"),
    lie("dynamics/grams", entry((1, 1, 4), 2), "sample 1, step 1, other 4 is 2, its mirror image", "Average them"),
    lie(
        "dynamics/grams", change(lambda a: -np.eye(STEPS) * a), "sample 0, step 0, other 0", "0 or more on the diagonal"
    ),
    lie("dynamics/peaks", change(lambda a: a[None]), "found shape [1, 2]. Allowed: [sample any]"),
    lie("dynamics/peaks", entry(1, -1), "sample 1 is -1. Allowed: 0 or more"),
    lie("dynamics/peaks", entry(1, np.inf), "sample 1 is inf. Allowed: finite numbers"),
    lie("dynamics/reach", change(lambda a: a[:, :5]), "found shape [6, 5]. Allowed: [step 6, other 6]"),
    lie("dynamics/reach", entry((2, 3), 1), "step 2, other 3 is 1. Allowed: 0 where other > step"),
    lie("dynamics/spread", entry(2, -0.5), "step 2 is -0.5. Allowed: 0 or more"),
    lie("dynamics/spread", change(lambda a: a[:5]), "found shape [5]. Allowed: [step 6]"),
    lie("dynamics/response", entry(5, np.nan), "step 5 is nan. Allowed: finite numbers"),
    lie("dynamics/response", lambda _, arrays, __: shorten_dynamics(arrays), "5 steps. Allowed: 6, the steps of the"),
]


def shorten_dynamics(arrays: Arrays) -> None:
    for name in ("dynamics/response", "dynamics/spread"):
        arrays[name] = arrays[name][:5].copy()
    for name in ("dynamics/grams", "dynamics/reach"):
        arrays[name] = arrays[name][..., :5, :5].copy()


def step_less(arrays: Arrays) -> None:
    """A site measured over a loop of one step less."""
    for name in [name for name in arrays if name.startswith(f"{SITE}/")]:
        is_table = arrays[name].ndim == 3
        arrays[name] = (arrays[name][:, :5, :5] if is_table else arrays[name][..., :5]).copy()


def branch_less(arrays: Arrays) -> None:
    for name in [name for name in arrays if name.startswith(f"{SITE}/residual/")]:
        arrays[name] = arrays[name][:1].copy()


def without_residual(tree: Tree, arrays: Arrays, _: str) -> None:
    put(None)(tree, arrays, f"{SITE}/residual")
    for name in [name for name in arrays if name.startswith(f"{SITE}/residual/")]:
        del arrays[name]


def without_ratio(tree: Tree, arrays: Arrays, field: str) -> None:
    put(None)(tree, arrays, field)
    del arrays[field]


def rename(tree: Tree, arrays: Arrays, _: str, name: str) -> None:
    tree["denoisers"] = {name: tree["denoisers"]["transformer"]}
    for old in [old for old in arrays if old.startswith("transformer/")]:
        arrays[old.replace("transformer", name, 1)] = arrays.pop(old)


def move(tree: Tree, arrays: Arrays, _: str, site: str) -> None:
    sites = tree["denoisers"]["transformer"]["sites"]
    sites[site] = sites.pop("block:blocks.0")
    for old in [old for old in arrays if old.startswith(BLOCK)]:
        arrays[old.replace("block:blocks.0", site, 1)] = arrays.pop(old)


def shorten(_: Tree, arrays: Arrays, __: str) -> None:
    arrays[f"{BLOCK}/compute"] = arrays[f"{BLOCK}/compute"][:5].copy()
    arrays[f"{BLOCK}/weights"] = arrays[f"{BLOCK}/weights"][:, :5].copy()


def compute_inside(_: Tree, arrays: Arrays, __: str) -> None:
    arrays[f"{BLOCK}/compute"][2] = 1
    arrays[f"{BLOCK}/weights"][:, 2] = 0


def reach_too_far(_: Tree, arrays: Arrays, __: str) -> None:
    weights = arrays[f"{BLOCK}/weights"].repeat(2, axis=2)
    weights[:, :, 1] = 0
    weights[0, 2, 1] = 1
    arrays[f"{BLOCK}/weights"] = weights


def forged(document: CacheSchedule | Profile, path: Path, edit: Lie, field: str) -> Path:
    return forge(document, path, lambda tree, arrays: edit(tree, arrays, field))


@pytest.mark.parametrize(("field", "edit", "words"), SCHEDULE_LIES)
def test_a_schedule_that_lies(tmp_path: Path, field: str, edit: Lie, words: tuple[str, ...]) -> None:
    refused(CacheSchedule, forged(schedule(), tmp_path / "schedule.safetensors", edit, field), field, *words)


@pytest.mark.parametrize(("field", "edit", "words"), PROFILE_LIES)
def test_a_profile_that_lies(tmp_path: Path, field: str, edit: Lie, words: tuple[str, ...]) -> None:
    refused(Profile, forged(profile(after=1), tmp_path / "profile.safetensors", edit, field), field, *words)


DOCUMENTS = pytest.mark.parametrize(
    "document", [schedule(), profile(after=1), token_schedule(), token_profile()], ids=type
)


@DOCUMENTS
def test_a_forgery_without_a_lie_is_read(tmp_path: Path, document: CacheSchedule | Profile) -> None:
    path = forge(document, tmp_path / "file.safetensors", lambda tree, arrays: None)
    assert type(document).load(path) == document


@pytest.mark.parametrize(
    ("kinds", "lies"),
    [
        ((CacheSchedule, DenoiserPlan, SitePlan, Online, Expected, NoiseSchedulerId, Guidance), SCHEDULE_LIES),
        ((Profile, DenoiserProfile, SiteProfile, KeptProfile, Tables, Dynamics), PROFILE_LIES),
    ],
)
def test_every_field_has_been_lied_about(kinds: tuple[type, ...], lies: list[Any]) -> None:
    told = {part for param in lies for part in param.values[0].split("/")}
    assert {field.name for kind in kinds for field in dataclasses.fields(kind)} <= told


def fields(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Every field of every object in a description, as errors call it."""
    for key, value in tree.items():
        yield prefix + key
        if key in {"denoisers", "sites", "kept"}:
            for name, inside in value.items():
                yield from fields(inside, f"{prefix}{name}/")
        elif isinstance(value, dict) and key not in ("provenance", "scales", "options"):
            yield from fields(value, f"{prefix}{key}/")


@DOCUMENTS
def test_a_field_missing_or_unknown_in_any_object(tmp_path: Path, document: CacheSchedule | Profile) -> None:
    path, tree = tmp_path / "file.safetensors", {}
    forge(document, path, lambda found, arrays: tree.update(found))
    names = set(fields(tree)) - {"format", "version", "library"}
    for name in sorted(names):
        refused(type(document), forged(document, path, drop, name), name, "the field is missing. Allowed: exactly ")
    for extra in sorted({f"{name.rpartition('/')[0]}/colour".lstrip("/") for name in names}):
        forged(document, path, put("red"), extra)
        refused(type(document), path, extra, "the field is unknown. Allowed: exactly ")
    assert {f.name for f in dataclasses.fields(document)} < names  # and those inside


@pytest.mark.parametrize(
    ("word", "field", "found"), [("1e999", "guidance/scales/guidance_scale", "inf"), ("-1e99", "steps", "-1e+99")]
)
def test_a_number_written_too_large(tmp_path: Path, word: str, field: str, found: str) -> None:
    path = forged(schedule(), tmp_path / "schedule.safetensors", put(77777), field)
    path.write_bytes(path.read_bytes().replace(b"77777", word.encode()))
    refused(CacheSchedule, path, field, f"found {found}. Allowed: ")


def test_a_message_stays_short_however_long_the_names(tmp_path: Path) -> None:
    def edit(tree: Tree, arrays: Arrays, field: str) -> None:
        put("")(tree, arrays, "transformer/class_name")
        rename(tree, arrays, field, "x" * 10**5)

    path = forged(schedule(), tmp_path / "schedule.safetensors", edit, "")
    refused(CacheSchedule, path, "x" * 200, "found ''")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(1, 255), st.booleans())
def test_a_damaged_byte_is_refused_or_harmless(where: int, flip: int, cut: bool) -> None:
    damaged = bytearray(VALID)
    damaged[where] ^= flip
    try:
        read = CacheSchedule.from_bytes(bytes(damaged[: where + 1] if cut else damaged))
    except DocumentError:
        return
    assert CacheSchedule.from_bytes(read.to_bytes()) == read


def test_errors_made_in_memory_name_the_class_and_the_field() -> None:
    with pytest.raises(DocumentError, match=re.escape("SitePlan: field 'weights': branch 0, step 0, anchor 0 is nan")):
        SitePlan(compute=np.array([True, False]), weights=np.full((1, 2, 1), np.nan))
    with pytest.raises(DocumentError, match=re.escape("CacheSchedule: field 'transformer/block:blocks.0/compute': 6")):
        schedule(steps=7, timesteps=None, sigmas=None)
    with pytest.raises(
        DocumentError, match=re.escape("field 'weights': found list. Allowed: a numpy array of float64")
    ):
        SitePlan(compute=np.array([True, False]), weights=[[[0.0], [1.0]]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "terms",
    [
        {"weights": np.zeros((1, 2, 1))},
        {"weights": np.ones((1, 2, 1)), "scale": np.zeros((1, 2))},
        {
            "weights": np.ones((1, 2, 1)),
            "kappa": np.ones((1, 2)),
            "scale": np.zeros((1, 2, 3)),
            "bias": np.zeros((1, 2)),
        },
    ],
)
def test_a_prediction_of_zero_is_refused_for_every_cause(terms: dict[str, np.ndarray]) -> None:
    compute = np.array([True, False])
    terms["weights"] = terms["weights"] * ~compute[:, None]
    with pytest.raises(DocumentError, match="branch 0, step 1 is predicted, with all coefficients zero"):
        SitePlan(compute=compute, **terms)
