"""The schedule as data: what is equal, what it says about itself, and that a file keeps all of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import STEPS, forge, hold, mask, online, profile, schedule, schedules
from hypothesis import HealthCheck, given, settings
from scipy.stats import t as student_t

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
from diffcache.documents.schedule import decibels
from diffcache.errors import DocumentError

ROOT = Path(__file__).parents[2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules())
def test_a_file_keeps_any_valid_schedule(original: CacheSchedule) -> None:
    data = original.to_bytes()
    read = CacheSchedule.from_bytes(data)
    assert read == original
    assert read.to_bytes() == data
    assert read.digest() == original.digest()


@pytest.mark.parametrize("path_type", [str, Path])
def test_save_returns_the_path_and_load_reads_it(tmp_path: Path, path_type: Callable[[Path], Any]) -> None:
    path = schedule().save(path_type(tmp_path / "mine.safetensors"))
    assert path == tmp_path / "mine.safetensors"
    assert CacheSchedule.load(path_type(path)) == schedule()


@pytest.mark.parametrize("limit", [0.1, 1, np.float32(0.5), np.array(0.1), True])
def test_one_limit_for_all_steps_is_refused_with_the_way_to_write_it(limit: Any) -> None:
    with pytest.raises(DocumentError) as caught:
        Online(rule="first_block", limit=limit)
    assert f"'limit': found {limit!s}. Allowed: one number per step, for example np.full(steps, " in str(caught.value)


def another(site: str, **changes: np.ndarray | None) -> dict[str, DenoiserPlan]:
    """The denoisers of ``schedule()`` with something changed at one site."""
    old = schedule().denoisers["transformer"]
    fields = {name: getattr(old.sites[site], name) for name in ("compute", "weights", "kappa", "scale", "bias")}
    sites = {**old.sites, site: SitePlan(**fields | changes)}
    return {"transformer": dataclasses.replace(old, sites=sites)}


def decided(rule: Online | None) -> dict[str, DenoiserPlan]:
    """The denoisers of ``schedule()`` under another online rule."""
    return {"transformer": dataclasses.replace(schedule().denoisers["transformer"], online=rule)}


def one_bit_up(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.flat[np.flatnonzero(changed)[0]] = np.nextafter(changed.flat[np.flatnonzero(changed)[0]], np.inf)
    return changed


FULL = schedule().denoisers["transformer"].sites["model"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"denoisers": another("model", weights=one_bit_up(FULL.weights))}, id="one bit of one weight"),
        pytest.param({"denoisers": another("model", bias=one_bit_up(FULL.bias))}, id="one bit of one bias"),  # type: ignore[arg-type]
        pytest.param({"denoisers": another("model", kappa=None)}, id="no kappa"),
        pytest.param({"denoisers": another("model", scale=None)}, id="no scale"),
        pytest.param(
            {"denoisers": another("block:blocks.0", compute=mask("■■····"), weights=hold("■■····").weights)}, id="mask"
        ),
        pytest.param({"denoisers": {"unet": schedule().denoisers["transformer"]}}, id="name of the denoiser"),
        pytest.param({"noise_scheduler": None}, id="no noise scheduler"),
        pytest.param({"guidance": Guidance(mode="batched", branches=2, scales={"guidance_scale": 5.5})}, id="guidance"),
        pytest.param({"timesteps": None}, id="no timesteps"),
        pytest.param({"sigmas": None}, id="no noise levels"),
        pytest.param({"sigmas": one_bit_up(schedule().sigmas)}, id="one bit of one noise level"),  # type: ignore[arg-type]
        pytest.param({"denoisers": decided(None)}, id="nothing decided online"),
        pytest.param({"denoisers": decided(online(most=4))}, id="most steps in a row"),
        pytest.param({"denoisers": decided(online(polynomial=None))}, id="no polynomial"),
        pytest.param({"denoisers": decided(online(limit=one_bit_up(online().limit)))}, id="one bit of one limit"),
        pytest.param({"expected": None}, id="no expectation"),
        pytest.param(
            {"expected": dataclasses.replace(schedule().expected, origin="calibration")},  # type: ignore[type-var]
            id="where the expectation comes from",
        ),
        pytest.param({"provenance": {}}, id="no provenance"),
    ],
)
def test_the_smallest_difference_makes_schedules_unequal(changes: dict[str, Any]) -> None:
    assert schedule(**changes) != schedule()
    assert schedule(**changes).digest() != schedule().digest()


def test_schedules_are_equal_by_value() -> None:
    known = schedule().denoisers["transformer"]
    plan = dataclasses.replace(known, sites=dict(reversed(known.sites.items())), online=online())
    fortran = np.asfortranarray(schedule().timesteps)
    again = schedule(denoisers={"transformer": plan}, timesteps=fortran, steps=np.int64(STEPS))
    assert again == schedule()
    assert again.to_bytes() == schedule().to_bytes()
    assert schedule() != "a schedule"


def test_minus_zero_is_zero() -> None:
    plus, minus = hold("■·", bias=np.zeros((1, 2))), hold("■·", bias=-np.zeros((1, 2)))
    one, other = (CacheSchedule(steps=2, denoisers={"unet": DenoiserPlan(sites={"model": p})}) for p in (plus, minus))
    assert one == other
    assert one.to_bytes() == other.to_bytes()


def test_the_digest_does_not_depend_on_the_library_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    data, digest = schedule().to_bytes(), schedule().digest()
    monkeypatch.setattr("diffcache.documents.document.version_of", lambda package: "99.0")
    assert schedule().digest() == digest
    assert schedule().to_bytes() != data
    assert CacheSchedule.from_bytes(schedule().to_bytes()) == CacheSchedule.from_bytes(data)


WRITER = """
import hashlib, sys, types
package = types.ModuleType("diffcache")  # the documents alone, without what the package imports for others
package.__path__ = ["diffcache"]
sys.modules["diffcache"] = package
sys.path.insert(0, "tests/helpers")
from documents import profile, schedule
for document in (schedule(), profile()):
    print(hashlib.sha256(document.to_bytes()).hexdigest())
print(sorted({"torch", "diffusers", "huggingface_hub"} & sys.modules.keys()))
"""


def written_with(hash_seed: str, code: str = WRITER) -> list[str]:
    run = [sys.executable, "-c", code]
    return subprocess.check_output(run, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, text=True).splitlines()


def test_two_processes_write_the_same_bytes_without_torch() -> None:
    first, second = written_with("1"), written_with("2")
    assert first == second
    assert first[-1] == "[]"
    assert written_with("1", "print(hash('a'))") != written_with("2", "print(hash('a'))")  # the seeds do differ


def test_what_a_schedule_was_made_from_can_change_without_it() -> None:
    compute = mask("■··")
    plan = SitePlan(compute=compute, weights=hold("■··").weights)
    sites = {"model": plan}
    denoiser = DenoiserPlan(sites=sites)
    compute[:], sites["block:0"] = True, plan
    assert plan.steps_computed == 1
    assert list(denoiser.sites) == ["model"]


def test_nothing_in_a_schedule_can_be_changed() -> None:
    for document in (schedule(), CacheSchedule.from_bytes(schedule().to_bytes())):
        plan = document.denoisers["transformer"].sites["model"]
        rule = document.denoisers["transformer"].online
        for array in (plan.weights, document.sigmas, rule.limit, rule.polynomial):  # type: ignore[union-attr]
            with pytest.raises(ValueError, match="read-only"):
                array.flat[0] = 7  # type: ignore[union-attr]
        with pytest.raises(TypeError):
            document.denoisers["vae"] = document.denoisers["transformer"]  # type: ignore[index]
        with pytest.raises(AttributeError):
            document.steps = 7  # type: ignore[misc]


def test_mappings_are_sorted() -> None:
    sites = {name: hold("■·") for name in ("sublayer:b.0.attn", "block:b.1", "stack:b", "block:b.0", "model")}
    assert list(DenoiserPlan(sites=sites).sites) == ["block:b.0", "block:b.1", "model", "stack:b", "sublayer:b.0.attn"]


def test_a_schedule_can_be_copied_and_sent_to_another_process() -> None:
    assert copy.deepcopy(schedule()) == schedule()
    assert pickle.loads(pickle.dumps(schedule())) == schedule()


@pytest.mark.parametrize(
    ("compute", "weights", "anchors"),
    [
        pytest.param("■■■", np.zeros((1, 3, 3)), 0, id="nothing predicted"),
        pytest.param("■■·", [[[0, 0, 0], [0, 0, 0], [1, 0, 0]]], 1, id="three slots, one used"),
        pytest.param("■■·", [[[0, 0, 0], [0, 0, 0], [2, -1, 0]]], 2, id="two used"),
        pytest.param("■■·", [[[0, 0], [0, 0], [0, 1]]], 2, id="only the older one"),
        pytest.param("■■·", [[[0], [0], [1]], [[0], [0], [2]]], 1, id="two branches"),
    ],
)
def test_anchors_are_those_that_weights_refer_to(compute: str, weights: Any, anchors: int) -> None:
    plan = SitePlan(compute=mask(compute), weights=np.array(weights, np.float64))
    assert (plan.anchors, plan.steps_computed) == (anchors, compute.count("■"))


@pytest.mark.parametrize("name", ["kappa", "bias"])
def test_a_prediction_without_weights_still_has_an_anchor(name: str) -> None:
    plan = SitePlan(compute=mask("■·"), weights=np.zeros((1, 2, 1)), **{name: np.ones((1, 2))})
    assert plan.anchors == 1


def test_a_step_is_computed_when_any_site_computes() -> None:
    def computed(**sites: SitePlan) -> int:
        names = {"model": "model", "first": "block:blocks.0", "second": "block:blocks.1"}
        plan = DenoiserPlan(sites={names[key]: plan for key, plan in sites.items()})
        return CacheSchedule(steps=4, denoisers={"unet": plan}).computed_steps

    assert computed(model=hold("■·■·")) == 2
    assert computed(model=hold("■·■·"), first=hold("■···")) == 2
    assert computed(first=hold("■·■·"), second=hold("■··■")) == 3


def test_with_provenance_adds_and_replaces_and_leaves_the_original() -> None:
    original = schedule()
    noted = original.with_provenance(scheduler="fit", error="0.01")
    assert noted.provenance == {"scheduler": "fit", "error": "0.01"}
    assert original == schedule()
    assert (noted.denoisers, noted.guidance) == (original.denoisers, original.guidance)


def test_a_schedule_printed_shows_its_masks() -> None:
    assert str(schedule()).splitlines() == [
        "2 of 5 steps computed; the loop runs steps 1 to 5 of 6",
        "noise scheduler Euler",
        "guidance batched, 2 branches, guidance_scale 5",
        "expected 40.0 dB, worst tenth 35.5, best 44.0, from 16 held-out samples",
        "noise levels moved",
        "transformer (Net)",
        "  decided in the run by drift, limit 0.5, gamma 0.5, norm l1",
        "  block:blocks.0  0/5  ·····",
        "  model           2/5  ■·■·· kept in int8",
        "scheduler: by hand",
    ]
    bare = CacheSchedule(steps=2, denoisers={"unet": DenoiserPlan(sites={"model": hold("■·")})})
    assert bare.describe().splitlines() == ["1 of 2 steps computed", "unet", "  model  1/2 ■·"]


def test_an_expectation_is_the_mean_and_the_deciles_of_what_was_seen() -> None:
    psnr_db = np.arange(20.0, 41.0)
    seen = Expected.over(np.random.default_rng(0).permutation(psnr_db), "calibration")
    wide = student_t.ppf(0.9, 20) * (1 + 1 / 21) ** 0.5 * psnr_db.std(ddof=1)
    assert (seen.mean_db, seen.samples) == (30.0, 21)
    assert (seen.low_db, seen.high_db) == pytest.approx((30 - wide, 30 + wide), abs=0.01)
    few = Expected.over(psnr_db[8:13], "calibration")
    assert few.high_db - few.mean_db > 1.4 * psnr_db[8:13].std(ddof=1)
    exact = Expected.over(np.array([np.inf, 100.0]), "simulated")  # a sample that ends where the full run does
    assert (exact.mean_db, exact.samples, exact.origin) == (150.0, 2, "simulated")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = schedule().save(tmp_path / "mine.safetensors")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        schedule(provenance={}).save(path)
    assert CacheSchedule.load(path) == schedule()
    assert list(tmp_path.iterdir()) == [path]


def test_save_replaces_an_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_text("old")
    schedule().save(path)
    assert CacheSchedule.load(path) == schedule()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "words"), [("missing/mine.safetensors", "no folder"), ("", "found a folder. Allowed: a file name")]
)
def test_save_refuses_a_place_where_no_file_can_be(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        schedule().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"a header of \d+ bytes"):
        schedule(provenance={"note": "x" * 2**22}).save(tmp_path / "mine.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_format_document_is_what_it_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (promised,) = re.findall(r"prints\n+```text\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    version = re.compile(r'"library": "[^"]*"')
    assert version.sub("", capsys.readouterr().out) == version.sub("", promised)


@pytest.mark.parametrize(
    "kind",
    [
        *(CacheSchedule, DenoiserPlan, SitePlan, Online, Expected, NoiseSchedulerId, Guidance),
        *(Profile, DenoiserProfile, SiteProfile, KeptProfile, Tables, Dynamics),
    ],
)
def test_the_format_document_names_every_field(kind: type) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert {field.name for field in dataclasses.fields(kind)} <= named


def version_1(document: CacheSchedule | Profile, path: Path) -> Path:
    """The document in ``path`` as version 1 of its format had it."""

    def edit(tree: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        tree["version"] = 1
        tree["guidance"]["scale"] = tree["guidance"].pop("scales").get("guidance_scale")
        for name, plan in tree["denoisers"].items():
            plan.pop("called", None)
            (plan.get("online") or {}).pop("options", None)
            arrays.pop(f"{name}/called", None)

    forge(document, path, edit)
    return path


@pytest.mark.parametrize("made", [schedule, profile])
@pytest.mark.parametrize("scales", [{}, {"guidance_scale": 5.0}])
def test_version_1_is_read(tmp_path: Path, made: Any, scales: dict[str, float]) -> None:
    document = made(guidance=Guidance(mode="batched", branches=2, scales=scales))
    if isinstance(document, CacheSchedule):
        online = dataclasses.replace(document.denoisers["transformer"].online, options={})
        plans = {
            name: dataclasses.replace(plan, called=None, online=online) for name, plan in document.denoisers.items()
        }
        document = dataclasses.replace(document, denoisers=plans)
    assert type(document).load(version_1(document, tmp_path / "old.safetensors")) == document


def test_steps_that_the_loop_does_not_run_are_neither_counted_nor_drawn() -> None:
    late = DenoiserPlan(sites={"model": hold("■■■·■·")}, called=mask("··■■■■"))
    made = CacheSchedule(steps=6, denoisers={"unet": late})
    assert made.computed_steps == 2
    text = made.describe()
    assert text.startswith("2 of 4 steps computed; the loop runs steps 2 to 5 of 6\n")
    assert "2/4   ■·■·" in text


def test_two_denoisers_each_count_the_steps_at_which_they_run() -> None:
    first = DenoiserPlan(sites={"model": hold("■··■··")}, called=mask("■■■···"))
    second = DenoiserPlan(sites={"model": hold("■··■··")}, called=mask("···■■■"))
    made = CacheSchedule(steps=6, denoisers={"transformer": first, "transformer_2": second})
    assert made.computed_steps == 2
    assert "1/3 ■··   " in made.describe()
    assert "1/3    ■··" in made.describe()


def test_a_schedule_that_skips_nothing_says_so() -> None:
    made = CacheSchedule(steps=3, denoisers={"unet": DenoiserPlan(sites={"model": hold("■■■")})})
    assert made.describe().startswith("3 of 3 steps computed; nothing is skipped\n")


@pytest.mark.parametrize(
    ("guidance", "text"),
    [
        (Guidance(mode="none", branches=1, scales={"guidance_scale": 3.5}), "none, guidance_scale 3.5"),
        (Guidance(mode="none", branches=1), "none"),
        (Guidance(mode="separate", branches=2, scales={"true_cfg_scale": 4}), "separate, 2 branches, true_cfg_scale 4"),
        (Guidance(mode="batched", branches=3), "batched, 3 branches, scale not checked"),
    ],
)
def test_guidance_in_one_line(guidance: Guidance, text: str) -> None:
    assert str(guidance) == text
    assert f"guidance {text}\n" in schedule(guidance=guidance, denoisers=PLAIN, expected=None).describe()


PLAIN = {"transformer": DenoiserPlan(sites={"model": hold("■·■·■·")})}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([200.0, 218.0], "no difference from the full run beyond rounding, from 2 held-out samples, which is few"),
        ([150.0], "no difference from the full run beyond rounding, from 1 held-out sample"),
        ([60.0, 200.0], "130.0 dB, worst tenth -228.6, best exact, from 2 held-out samples, which is few"),
        ([40.0], "40.0 dB, from 1 held-out sample: how far others spread is not known"),
    ],
)
def test_a_fidelity_that_no_float_could_show_is_not_given_as_a_number(values: list[float], says: str) -> None:
    assert str(Expected.over(np.array(values), "held-out")) == says


def test_decibels_are_a_number_or_exact() -> None:
    assert [decibels(db) for db in (12.34, 144.4, 144.6, 200.0, float("inf"))] == [
        "12.3 dB",
        "144.4 dB",
        "exact",
        "exact",
        "exact",
    ]
