"""The demo: what it writes, and that its numbers are what they say."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from diffcache import CacheSchedule, accelerated, report
from diffcache.assets import MODELS, NAMES, load
from diffcache.cli import app
from diffcache.demo import Size, run_demo
from diffcache.demo.run import BEST_PUBLISHED, split
from diffcache.eval import evenly_reused, fewer_steps
from diffcache.eval.metrics.psnr import score as psnr_db

SMALL = Size(budgets=(12,), calibration=4, held_out=4, fits=2, repeats=1)


@pytest.fixture(scope="module", params=NAMES)
def demo(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return request.param, out, run_demo(request.param, out, SMALL)


def methods(found):
    return {m["name"]: m for m in found.record["methods"]}


def test_the_demo_writes_pictures_report_record_and_schedules_that_work(demo):
    name, out, found = demo
    files = {"pictures.png", "table.md", "record.json", "report.html", "pipeline.json", f"{name}-50-12.safetensors"}
    assert {f.name for f in out.iterdir()} == files | {"pictures", "parts", "exact", "trials"}
    assert json.loads((out / "record.json").read_text()) == found.record
    model = load(name)
    schedule = CacheSchedule.load(out / f"{name}-50-12.safetensors")
    with accelerated(model.pipe, schedule):
        model.pipe(**model.call(model.subjects[:1], [1]))
        seen = report(model.pipe)
    forwards = 1 + model.about.separate_cfg  # of a step
    assert (seen.computed, seen.predicted) == (12 * forwards, 38 * forwards)


def test_every_baseline_stands_in_the_table_at_the_same_compute(demo):
    name, _, found = demo
    about = MODELS[name]
    solver = {"flux": "UniPC", "dit": "DPM-Solver++"}[about.family]
    plain, rule = about.sampler, BEST_PUBLISHED[name][0]
    assert {n: (m["computed_steps"], m["steps"]) for n, m in methods(found).items()} == {
        "full run": (50, 50),
        "diffcache, 12 computed": (12, 50),
        f"12 steps, {plain}": (12, 12),
        f"12 steps, {solver}": (12, 12),
        "uniform reuse, 12 computed": (12, 50),
        f"{rule}, 12 computed": (12, 50),
    }
    assert methods(found)[f"{rule}, 12 computed"]["kind"] == "peer"


def test_ours_is_nearest_to_the_full_run(demo):
    _, _, found = demo
    psnr = {m["kind"]: [] for m in found.record["methods"]}
    for method in found.record["methods"]:
        psnr[method["kind"]].append(method["scores"]["psnr"]["mean"])
    assert psnr["ours"][0] > max(psnr["fewer steps"] + psnr["reuse"] + psnr["peer"])


@pytest.mark.fast
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
        better, own = fewer_steps(model.pipe, 100, better=True), model.pipe.scheduler
        with better.on(model.pipe):
            assert type(model.pipe.scheduler) is not type(own)
            assert psnr_db(model.pipe(**model.call(**call, steps=100)).images, full)[0] > 25


def test_uniform_reuse_computes_the_steps_it_says():
    schedule = evenly_reused(["transformer"], 50, 12)
    assert schedule.computed_steps == 12


@pytest.mark.fast
def test_the_command_lists_what_it_can_do_and_names_bad_input():
    runner = CliRunner()
    assert "demo" in runner.invoke(app, ["--help"]).output
    bad = runner.invoke(app, ["demo", "--model", "sdxl"])
    assert bad.exit_code == 2
    options = get_command(app).get_command(None, "demo").params
    assert {option.name: option.default for option in options}["model"] == "dit"  # the guided one shows a difference
