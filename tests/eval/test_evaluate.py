"""Evaluations from end to end on a demo model: what the record says is so, what was stopped goes on, nothing stays."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import TINY, fresh, shared
from probes import bound, hold
from processes import in_processes
from skimage.metrics import peak_signal_noise_ratio

from diffcache import ScheduleSet, accelerated, evaluate, measure
from diffcache.assets import DemoModel, load
from diffcache.errors import BadOption, DiffCacheError, DocumentError, ScheduleMismatch, UnknownName
from diffcache.eval import Method, evaluation, fewer_steps, full, ours, runner, uniform_reuse
from diffcache.eval.metrics import scorer
from diffcache.eval.record import read
from diffcache.eval.timed_run import watched

STEPS = 8


@functools.cache
def model() -> DemoModel:
    return load("flux")


def calls(number: int = 2, batch: int = 2) -> list[dict[str, Any]]:
    names = model().subjects
    return [
        model().call(names[i * batch : (i + 1) * batch], range(70 + i * batch, 70 + (i + 1) * batch), steps=STEPS)
        for i in range(number)
    ]


def few(out: Path, **changes: Any) -> evaluation.Evaluation:
    pipe = model().pipe
    options: dict[str, Any] = {
        "compare": [fewer_steps(pipe, 4), uniform_reuse(pipe, STEPS, 4)], "out": out, "progress": False,
    }  # fmt: skip
    return evaluate(pipe, {"every second": "taylorseer:every=2,order=1"}, calls(), **options | changes)


def by_name(record: dict[str, Any]) -> dict[str, Any]:
    return {m["name"]: m for m in record["methods"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> evaluation.Evaluation:
    return few(tmp_path_factory.mktemp("evaluation"))


def test_scores_are_those_of_the_pictures(made: evaluation.Evaluation) -> None:
    pipe = model().pipe
    wanted = []
    for call, same in zip(calls(), calls(), strict=True):
        exact = pipe(**call).images
        with accelerated(pipe, "taylorseer:every=2,order=1"):
            fast = pipe(**same).images
        wanted += [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(exact, fast, strict=True)]
    score = by_name(made.record)["every second"]["scores"]["psnr"]
    np.testing.assert_allclose(score["values"], wanted, rtol=1e-4)
    assert score["mean"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert score["low"] <= score["mean"] <= score["high"]
    assert by_name(made.record)["full run"]["scores"]["latent"]["values"] == [0.0] * 4


def test_work_is_counted_whoever_does_it(made: evaluation.Evaluation) -> None:
    found = by_name(made.record)
    computed = {name: (m["steps"], m["computed_steps"]) for name, m in found.items()}
    assert computed == {
        "full run": (STEPS, STEPS),
        "every second": (STEPS, 4),
        "4 steps, Euler": (4, 4),
        "uniform reuse, 4 computed": (STEPS, 4),
    }
    assert [m["kind"] for m in made.record["methods"]] == ["full", "ours", "fewer steps", "reuse"]
    assert found["every second"]["cache_bytes"] > found["uniform reuse, 4 computed"]["cache_bytes"] > 0
    for method in found.values():
        assert 0 < method["seconds"]["loop"]["low"] <= method["seconds"]["loop"]["median"]
        assert method["seconds"]["pipeline"]["median"] > method["seconds"]["loop"]["median"]
        assert method["seconds"]["loop"]["runs"] == 2
    assert found["full run"]["speedup"] == {"loop": 1, "pipeline": 1}


def test_the_error_along_the_trajectory_is_recorded_step_by_step(made: evaluation.Evaluation) -> None:
    way = by_name(made.record)["every second"]["trajectory"]
    pipe, call = model().pipe, calls()[0]
    exact = watched(pipe, call, closely=True)
    with accelerated(pipe, "taylorseer:every=2,order=1"):
        fast = watched(pipe, call, closely=True)
    wanted = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(fast.states, exact.states, strict=True)]
    np.testing.assert_allclose(way["measured"], wanted, rtol=1e-4, atol=1e-7)
    assert way["measured"][0] == 0 < way["measured"][1]  # the first step is computed
    assert by_name(made.record)["4 steps, Euler"]["trajectory"] is None  # other steps


def test_the_simulated_trajectory_error_is_recorded_with_the_measured_one(tmp_path: Path) -> None:
    pipe = model().pipe
    known = measure(pipe, calls(2, 4))
    plans = {"reuse": uniform_reuse(pipe, STEPS, 4).source, "blocks": "uniform:every=2,sites=block"}
    found = evaluate(pipe, plans, calls(1), compare=(), profile=known, out=tmp_path, progress=False)
    way = by_name(found.record)["reuse"]["trajectory"]
    assert way["expected"][0] == way["measured"][0] == 0
    ratio = np.array(way["expected"][1:]) / np.array(way["measured"][1:])
    assert 0.7 < ratio[0] < 1.4
    assert (ratio > 0.4).all()
    assert (ratio < 4).all()  # so few steps make errors that are not small
    assert by_name(found.record)["blocks"]["trajectory"]["expected"] is None  # nothing foretells inner sites


def test_pictures_lie_where_the_record_says(made: evaluation.Evaluation) -> None:
    ids = [sample["id"] for sample in made.record["samples"]]
    assert ids == ["0000-00", "0000-01", "0001-00", "0001-01"]
    exact = model().pipe(**calls()[1]).images
    for method in made.record["methods"]:
        assert list(method["pictures"]) == ids
    found = np.asarray(Image.open(made.folder / by_name(made.record)["full run"]["pictures"]["0001-01"]))
    np.testing.assert_array_equal(found, (exact[1] * 255).round().astype(np.uint8))
    assert [s["seed"] for s in made.record["samples"]] == [70, 71, 72, 73]


def test_record_table_and_report_are_written(made: evaluation.Evaluation) -> None:
    assert read(made.folder / "record.json") == json.loads(json.dumps(made.record))
    table = (made.folder / "table.md").read_text()
    assert str(made) in table
    for method in made.record["methods"]:
        assert method["name"] in table
        assert method["name"] in made.report.read_text()
    about = made.record["circumstances"]
    assert {"created", "diffcache", "torch", "diffusers", "python", "device", "threads", "commit"} <= about.keys()
    assert "Only 4 samples" in made.record["warning"]
    made.report.unlink()
    evaluation.again(made.folder)
    assert made.report.is_file()


def test_nothing_stays_on_the_pipeline(tmp_path: Path) -> None:
    pipe = model().pipe
    pipe(**calls(1)[0])
    attributes, scheduler = dict(vars(pipe)), pipe.scheduler
    given = calls(1)
    before = [g.get_state() for g in given[0]["generator"]]
    evaluate(
        pipe, {"b": "uniform:every=2,sites=block"}, given, out=tmp_path, progress=False,
        compare=[fewer_steps(pipe, 4, better=True)],
    )  # fmt: skip
    found = dict(vars(pipe)) | {
        "_num_timesteps": attributes["_num_timesteps"]
    }  # the pipeline's own note of its last run
    assert found == attributes
    assert pipe.scheduler is scheduler
    assert all(torch.equal(g.get_state(), b) for g, b in zip(given[0]["generator"], before, strict=True))


class StoppedError(Exception):
    pass


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[bool]:
    """Every run of the pipeline, and whether it was looked at closely; stopped after so many."""
    seen: list[bool] = []

    def watch(pipe: Any, call: Any, *, closely: bool = False) -> Any:
        if stop_after is not None and len(seen) == stop_after:
            raise StoppedError
        seen.append(closely)
        return watched(pipe, call, closely=closely)

    monkeypatch.setattr(runner, "watched", watch)
    return seen


def scores(record: dict[str, Any]) -> dict[str, Any]:
    return {m["name"]: ({n: s["values"] for n, s in m["scores"].items()}, m["trajectory"]) for m in record["methods"]}


@pytest.mark.parametrize("stop_after", [1, 4, 9, 12])
def test_a_run_that_is_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, made: evaluation.Evaluation
) -> None:
    counting(monkeypatch, stop_after)
    with pytest.raises(StoppedError):
        few(tmp_path)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.json")}
    seen = counting(monkeypatch)
    again = few(tmp_path)
    assert scores(again.record) == scores(made.record)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert 8 - len(done) <= seen.count(False) <= 2 * (8 - len(done))  # each method is warmed up again
    seen.clear()
    few(tmp_path)
    assert not seen  # all of it is there


def test_what_was_made_with_other_settings_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(tmp_path)
    pipe, seen = model().pipe, counting(monkeypatch)
    options: dict[str, Any] = {"compare": (), "out": tmp_path, "progress": False}
    evaluate(pipe, {"every second": "taylorseer:every=4,order=1"}, calls(), **options)
    assert seen.count(False) == 2  # the method's, for both calls; the full run is there
    seen.clear()
    evaluate(pipe, {"every second": "taylorseer:every=4,order=1"}, calls(), metrics=("psnr",), **options)
    assert seen.count(False) == 4
    seen.clear()
    other = [
        call | {"generator": [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]} for call in calls(1)
    ]
    evaluate(pipe, {"every second": "taylorseer:every=4,order=1"}, other, metrics=("psnr",), **options)
    assert seen.count(False) == 2


def test_scorers_are_asked_with_prompts_and_judged_against_the_full_run(tmp_path: Path) -> None:
    asked: list[Any] = []

    def brightness(pictures: np.ndarray, prompts: Any) -> np.ndarray:
        asked.append(list(prompts))
        return np.asarray(pictures).mean(axis=(1, 2, 3))

    dark = Method(name="in the dark", kind="peer", change={"guidance_scale": 3.5})
    found = few(tmp_path, scorers=[scorer(brightness, name="brightness")], compare=[dark])
    score = by_name(found.record)["in the dark"]["scores"]["brightness"]
    assert score["verdicts"] == []  # four samples are too few
    assert found.record["metrics"]["brightness"]["better"] == "higher"
    assert len(asked) == 6


def test_where_nothing_is_decoded_states_are_compared(tmp_path: Path) -> None:
    pipe = shared("flux")
    call = TINY["flux"].call(pipe, batch=2) | {"generator": torch.Generator().manual_seed(3)}
    found = evaluate(
        pipe, {"a": "uniform:every=2"}, [call], metrics=("latent",), compare=(), out=tmp_path, progress=False
    )
    method = by_name(found.record)["a"]
    assert method["pictures"] is None
    assert method["scores"]["latent"]["mean"] > 0
    assert found.report.is_file()
    same = evaluate(
        pipe, {"a": "uniform:every=1"}, [call], metrics=("latent",), compare=(), out=tmp_path, progress=False
    )
    assert by_name(same.record)["a"]["scores"]["latent"]["values"] == [0.0, 0.0]


def test_of_several_schedules_the_one_for_the_steps_of_the_calls_is_evaluated(tmp_path: Path) -> None:
    pipe = shared("flux")
    call = TINY["flux"].call(pipe, batch=2) | {"generator": torch.Generator().manual_seed(3)}
    steps = call["num_inference_steps"]
    right, longer = (bound(pipe, hold("#" + "." * (n - 1))) for n in (steps, steps + 1))
    path = ScheduleSet.of(right, longer).save(tmp_path / "set.json")
    found = evaluate(
        pipe,
        {"alone": right, "set": path, "dict": {steps: right, steps + 1: "full"}},
        [call],
        metrics=("latent",),
        out=tmp_path / "a",
        progress=False,
    )
    methods = by_name(found.record)
    assert methods["alone"]["computed_steps"] == 1
    assert methods["alone"]["scores"]["latent"]["values"][0] > 0
    for name in ("set", "dict"):
        assert methods[name]["scores"] == methods["alone"]["scores"]
        assert methods[name]["computed_steps"] == 1
        assert methods[name]["schedule"] == methods["alone"]["schedule"]
    assert "uniform reuse, 1 computed" in methods  # the cost is that of the schedule for these steps
    with pytest.raises(ScheduleMismatch, match=f"Covered: {steps + 1}, {steps + 2} steps"):
        evaluate(pipe, {"a": {steps + 1: longer, steps + 2: "full"}}, [call], metrics=("latent",), out=tmp_path / "b")
    assert ours("a", path, store="int8").for_steps(steps).store == "int8"


def test_another_model_in_the_same_folder_is_run_anew(tmp_path: Path) -> None:
    pipe = fresh("flux")
    call = TINY["flux"].call(pipe, batch=2) | {"generator": torch.Generator().manual_seed(3)}
    options: dict[str, Any] = {"metrics": ("latent",), "compare": (), "out": tmp_path, "progress": False}

    def error() -> float:
        return by_name(evaluate(pipe, {"a": "uniform:every=3"}, [call], **options).record)["a"]["scores"]["latent"][
            "mean"
        ]

    first = error()
    assert error() == first
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.mul_(1.1)
    assert error() != first


def test_states_of_two_branches_count_once(tmp_path: Path) -> None:
    """DiT carries both branches through its noise scheduler."""
    dit = load("dit")
    call = dit.call(dit.subjects[:3], [1, 2, 3], steps=4)
    found = evaluate(dit.pipe, {"a": "uniform:every=2"}, [call], compare=(), out=tmp_path, progress=False)
    assert len(by_name(found.record)["a"]["scores"]["latent"]["values"]) == 3


def test_verdicts_need_samples_and_name_the_best_rival_of_no_more_work(tmp_path: Path) -> None:
    pipe = model().pipe
    found = evaluate(
        pipe, {"a": "taylorseer:every=2,order=1"}, calls(4, 4), metrics=("psnr",), out=tmp_path, progress=False,
        compare=[fewer_steps(pipe, 4), fewer_steps(pipe, 6), uniform_reuse(pipe, STEPS, 2)],
    )  # fmt: skip
    score = by_name(found.record)["a"]["scores"]["psnr"]
    assert score["verdicts"] == [{"verdict": "better", "against": "4 steps, Euler"}]  # 6 are more work, 2 are worse


def test_processes_share_an_evaluation(tmp_path: Path, made: evaluation.Evaluation) -> None:
    out = tmp_path / "shared"

    def job(rank: int) -> Any:
        found = few(out)
        return scores(found.record), sorted(p.name for p in out.glob("parts/*/*.json"))

    first, second = in_processes(2, job, tmp_path)
    assert first[0] == second[0]
    assert first[0] == scores(made.record)
    assert len(list(out.glob("parts/*/*.json"))) == 8
    assert read(out / "record.json")["samples"] == made.record["samples"]


# Bad input.


def test_calls_without_a_generator_are_refused(tmp_path: Path) -> None:
    call = calls(1)[0]
    del call["generator"]
    with pytest.raises(BadOption, match="call 0 has no generator"):
        evaluate(model().pipe, {}, [call], out=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"metrics": ("psnrr",)}, UnknownName, "no metric called 'psnrr'"),
        ({"options": {"lpips": {}}}, BadOption, "options='lpips'"),
        ({"compare": [ours("every second", "full")]}, BadOption, "names that no other method has"),
        ({"compare": [full()]}, BadOption, "names that no other method has"),
        ({"scorers": [scorer(lambda p, t: p, name="psnr")]}, BadOption, "no metric and no other scorer"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, error: type[Exception], words: str
) -> None:
    seen = counting(monkeypatch)
    with pytest.raises(error, match=words):
        few(tmp_path, **changes)
    assert not seen


def test_calls_have_one_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"different numbers of steps, \[6, 8\]"):
        evaluate(model().pipe, {}, [calls(1)[0], calls(1)[0] | {"num_inference_steps": 6}], out=tmp_path)
    with pytest.raises(BadOption, match="at least one"):
        evaluate(model().pipe, {}, [], out=tmp_path)


def test_methods_that_draw_something_else_are_refused(tmp_path: Path) -> None:
    small = Method(name="small", kind="peer", change={"height": 32})
    with pytest.raises(DiffCacheError, match=r"'small' gave outputs of shape .* cannot be compared"):
        few(tmp_path, compare=[small])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', '{"format": "diffcache.evaluation", "version": 3}'])
def test_something_other_than_a_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DocumentError):
        evaluation.again(tmp_path)
