"""The demo: what it writes, and that its numbers are what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import skimage.metrics
from typer.testing import CliRunner

from diffcache import CacheSchedule, accelerated, report
from diffcache.assets import NAMES, load
from diffcache.cli import app
from diffcache.demo import Size, run_demo
from diffcache.demo.fidelity import psnr_db, ssim
from diffcache.demo.run import split
from diffcache.eval.methods import evenly_reused
from diffcache.eval.solvers import better_solver

SMALL = Size(budgets=(12,), calibration=8, held_out=4, search_s=1, repeats=1)


@pytest.fixture(scope="module", params=NAMES)
def demo(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return request.param, out, run_demo(request.param, out, SMALL)


def test_the_demo_writes_pictures_table_results_and_schedules_that_work(demo):
    name, out, rows = demo
    assert {f.name for f in out.iterdir()} == {"pictures.png", "table.md", "results.json", f"{name}-50-12.safetensors"}
    results = json.loads((out / "results.json").read_text())
    assert [set(r) for r in results["rows"]] == [
        {"method", "computed_steps", "total_steps", "speedup", "psnr_db", "ssim"}
    ] * len(rows)
    model = load(name)
    schedule = CacheSchedule.load(out / f"{name}-50-12.safetensors")
    with accelerated(model.pipe, schedule):
        model.pipe(**model.call(model.subjects[:1], [1]))
        seen = report(model.pipe)
    assert (seen.computed, seen.predicted) == (12, 38)


def test_every_baseline_stands_in_the_table_at_the_same_compute(demo):
    name, _, rows = demo
    solver = {"flux": "UniPC", "dit": "DPM-Solver++"}[name]
    plain = {"flux": "Euler", "dit": "DDIM"}[name]
    assert [(r.method, r.computed_steps, r.total_steps) for r in rows] == [
        ("full run", 50, 50),
        (f"fewer steps ({plain})", 12, 12),
        (f"fewer steps ({solver})", 12, 12),
        ("uniform reuse", 12, 50),
        ("diffcache", 12, 50),
    ]


def test_ours_is_nearest_to_the_full_run(demo):
    _, _, rows = demo
    ours = next(r for r in rows if r.method == "diffcache")
    others = [r for r in rows if r.method not in ("diffcache", "full run")]
    assert all(ours.psnr_db > r.psnr_db for r in others)


def test_calibration_and_comparison_share_no_seed_and_no_subject_where_there_are_enough():
    model = load("flux")
    (fitted, seeds), (shown, other_seeds) = split(model, Size())
    assert not set(seeds) & set(other_seeds)
    assert not set(fitted) & set(shown)


def test_the_better_solver_draws_the_same_picture_when_it_has_many_steps():
    """A baseline that solved another equation would lose for the wrong reason."""
    for name in NAMES:
        model = load(name)
        call = {"subjects": model.subjects[3:4], "seeds": [4]}
        full = model.pipe(**model.call(**call, steps=100)).images
        _, model.pipe.scheduler = better_solver(model.pipe)
        assert psnr_db(model.pipe(**model.call(**call, steps=100)).images, full)[0] > 25


def test_uniform_reuse_computes_the_steps_it_says():
    schedule = evenly_reused(["transformer"], 50, 12)
    assert schedule.computed_steps == 12


def test_fidelity_agrees_with_scikit_image():
    rng = np.random.default_rng(0)
    a = rng.random((2, 40, 48, 3)).astype(np.float32)
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    for i in range(2):
        expected = skimage.metrics.peak_signal_noise_ratio(a[i], b[i], data_range=1.0)
        assert psnr_db(b, a)[i] == pytest.approx(expected, abs=1e-3)
        similar = skimage.metrics.structural_similarity(
            a[i].astype(np.float64), b[i].astype(np.float64), data_range=1.0, channel_axis=2,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert ssim(b, a)[i] == pytest.approx(similar, abs=5e-3)  # they differ in the treatment of the rim


def test_the_command_lists_what_it_can_do_and_names_bad_input():
    runner = CliRunner()
    assert "demo" in runner.invoke(app, ["--help"]).output
    bad = runner.invoke(app, ["demo", "--model", "sdxl"])
    assert bad.exit_code == 2
