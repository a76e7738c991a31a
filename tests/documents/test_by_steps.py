"""Several schedules by number of steps: each run chooses one when its loop begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import profile
from online import decided, residual
from pipelines import TINY, fresh, run, shared
from probes import bound, hold, ours
from small_loop import loop, noise

import diffcache
from diffcache import CacheSchedule, Loop, ScheduleSet, accelerate, accelerated, estimate, report, resampled, restore
from diffcache.documents import hub
from diffcache.documents.collection import schedules_in
from diffcache.errors import BadOption, DocumentError, ScheduleMismatch
from diffcache.executor import FailedOpen
from diffcache.profiling.calibration import correct

pytestmark = pytest.mark.fast


def call_of(steps: int) -> dict[str, Any]:
    return TINY["flux"].call(shared("flux")) | {"num_inference_steps": steps}


def alone(pipe: Any, schedule: Any, steps: int) -> torch.Tensor:
    with accelerated(pipe, schedule):
        return run(pipe, call_of(steps))


def test_a_run_uses_the_schedule_of_its_number_of_steps() -> None:
    pipe = shared("flux")
    six, eight = bound(pipe, hold("#.#.#.")), bound(pipe, hold("#..#..#."), site="block")
    sources = {6: six, 8: eight, 9: "uniform:every=3", 12: decided(pipe, "first_block", most=2)}
    wanted = {steps: alone(pipe, source, steps) for steps, source in sources.items()}
    with accelerated(pipe, sources):
        for steps in (8, 6, 12, 9, 8):
            assert torch.equal(run(pipe, call_of(steps)), wanted[steps])
            seen = report(pipe)
            assert seen.chosen.endswith(", of those for 6, 8, 9, 12 steps")
            assert f"used {seen.chosen}" in str(seen)
            assert seen.schedule is not None
            assert seen.schedule.steps == steps
            assert seen.bytes_held == 0
            assert not seen.reasons
        assert seen.chosen.startswith("a schedule of 8 steps (hand-made)")
        run(pipe, call_of(9))
        assert report(pipe).chosen.startswith("the rule 'uniform:every=3'")
    assert not ours(pipe)
    with accelerated(pipe, six):
        run(pipe, call_of(6))
        assert report(pipe).chosen == ""
        assert "used" not in str(report(pipe))


@pytest.mark.parametrize("rule", ["first_block", "modulated_input"])
def test_schedules_of_one_stack_decide_each_in_their_own_way(rule: str) -> None:
    """In the same stack one criterion decides in the first block, the other elsewhere, and a plan without any."""
    pipe = shared("flux")
    other = {"first_block": "modulated_input", "modulated_input": "first_block"}[rule]
    stack = "stack:single_transformer_blocks"
    plan = residual("#..#..#.")
    fixed = bound(pipe, plan, site="stack")
    sources = {
        12: decided(pipe, rule, most=2),
        11: decided(pipe, other, most=2, plan=residual("#" + "." * 10)),
        10: decided(pipe, rule, most=2, plan=residual("#" + "." * 9), sites=[stack]),
        8: fixed,
    }
    wanted = {steps: alone(pipe, source, steps) for steps, source in sources.items()}
    plain = {steps: run(pipe, call_of(steps)) for steps in sources}
    assert not any(torch.equal(wanted[steps], plain[steps]) for steps in sources)
    with accelerated(pipe, sources):
        for steps in (8, 12, 11, 10, 8):
            assert torch.equal(run(pipe, call_of(steps)), wanted[steps])
            assert not report(pipe).reasons


def test_another_number_of_steps_is_refused_with_those_that_are_covered() -> None:
    pipe = fresh("flux")
    sources = {6: "uniform:every=2", 9: "uniform:every=3"}
    plain = run(pipe, call_of(7))
    with accelerated(pipe, sources):
        with pytest.raises(ScheduleMismatch, match=r"no schedule is given for 7 steps\. Covered: 6, 9 steps"):
            run(pipe, call_of(7))
        run(pipe, call_of(6))
        assert report(pipe).predicted
    with accelerated(pipe, sources, mismatch="full"):
        with pytest.warns(FailedOpen, match="computed in full: no schedule is given for 7 steps"):
            assert torch.equal(run(pipe, call_of(7)), plain)
        assert report(pipe).chosen == ""
        run(pipe, call_of(9))
        assert report(pipe).predicted


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "the dictionary is empty"),
        ({"28": "full"}, "the dictionary has the key '28'"),
        ({True: "full"}, "the dictionary has the key True"),
        ({0: "full"}, "the dictionary has the key 0"),
        ({7: bound(shared("flux"), hold("#.#.#."))}, "the key 7 holds a schedule of 6 steps"),
        ({6: 3}, "schedule=3 was given"),
        ({6: {6: "full"}}, "schedule="),
    ],
)  # fmt: skip
def test_other_dictionaries_are_refused(asked: Any, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        accelerate(shared("flux"), asked)
    assert not ours(shared("flux"))


def test_a_member_that_does_not_fit_is_refused_before_any_run() -> None:
    pipe = shared("flux")
    with pytest.raises(ScheduleMismatch, match="FluxTransformer2DModel"):
        accelerate(pipe, {6: "full", 8: bound(shared("dit"), hold("#..#..#."))})
    assert not ours(pipe)


def test_outputs_of_all_members_are_kept_in_the_format_that_is_asked_for() -> None:
    pipe = shared("flux")
    with accelerated(pipe, {6: bound(pipe, hold("#.#.#.")), 9: "uniform:every=3"}, store="int8"):
        for steps in (6, 9):
            run(pipe, call_of(steps))
            assert {row.kept_as for row in report(pipe).rows} == {"int8"}


def test_an_estimate_is_that_of_the_schedule_for_the_call() -> None:
    pipe = shared("flux")
    sources: dict[int, Any] = {6: bound(pipe, hold("#.#.#.")), 9: "uniform:every=3"}
    for steps, source in sources.items():
        assert estimate(pipe, sources, **call_of(steps)) == estimate(pipe, source, **call_of(steps))
    with pytest.raises(ScheduleMismatch, match="Covered: 6, 9 steps"):
        estimate(pipe, sources, **call_of(7))


def test_an_estimate_of_a_loop_whose_steps_only_a_run_shows() -> None:
    small = loop()
    given = Loop(small.transformer, lambda steps: sampled(small.transformer, steps))
    sources = {4: "uniform:every=2", 6: "uniform:every=3"}
    assert estimate(given, sources, steps=4, seed=1).compute_fraction == 0.5
    assert estimate(given, sources, steps=6, seed=1).compute_fraction == pytest.approx(1 / 3)
    with pytest.raises(ScheduleMismatch, match="Covered: 4, 6 steps"):
        estimate(given, sources, steps=5, seed=1)
    assert not any(name in vars(small.transformer) for name in ("forward", "begin"))


def test_a_loop_of_ones_own_chooses_too() -> None:
    network = loop().transformer
    sources = {4: "uniform:every=2", 6: "uniform:every=3,sites=block"}
    wanted = {}
    for steps, source in sources.items():
        with accelerated(network, source):
            wanted[steps] = sampled(network, steps)
    with accelerated(network, sources):
        for steps in (6, 4, 6):
            assert torch.equal(sampled(network, steps), wanted[steps])
        with pytest.raises(ScheduleMismatch, match="Covered: 4, 6 steps"):
            sampled(network, 5)


def sampled(network: Any, steps: int) -> torch.Tensor:
    x, times = noise(), torch.linspace(1, 0.1, steps)
    with torch.no_grad(), diffcache.trajectory(network, times):
        for t in times:
            x = x - network(hidden_states=x, timestep=t, prompt=noise(2, 1, 1))[0] / steps
    return x


# Folders


def schedules(pipe: Any) -> dict[int, CacheSchedule]:
    return {len(mask): bound(pipe, hold(mask)) for mask in ("#.#.#.", "#..#..#..")}


def test_a_folder_of_schedules_is_a_dictionary_of_them(tmp_path: Path) -> None:
    pipe = shared("flux")
    made = schedules(pipe)
    for steps, one in made.items():
        one.save(tmp_path / f"flux-{steps}.safetensors")
    profile().save(tmp_path / "profile.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    assert schedules_in(tmp_path) == made
    for place in (tmp_path, str(tmp_path)):
        accelerate(pipe, place)
        try:
            for steps in made:
                run(pipe, call_of(steps))
                assert report(pipe).schedule == made[steps]
        finally:
            restore(pipe)
    assert estimate(pipe, tmp_path, **call_of(6)).compute_fraction == 0.5


def test_a_folder_with_one_schedule_is_that_schedule_by_any_name(tmp_path: Path) -> None:
    pipe = shared("flux")
    made = schedules(pipe)[6]
    made.save(tmp_path / "mine.safetensors")
    with accelerated(pipe, tmp_path):
        with pytest.raises(ScheduleMismatch, match="made for 6 steps; this run takes 9"):
            run(pipe, call_of(9))
        run(pipe, call_of(6))
        assert report(pipe).chosen == ""


def test_of_two_with_the_same_steps_the_file_of_the_default_name_counts(tmp_path: Path) -> None:
    pipe = shared("flux")
    made, other = schedules(pipe)[6], bound(pipe, hold("#....."))
    made.save(tmp_path / "b.safetensors")
    other.save(tmp_path / "a.safetensors")
    with pytest.raises(BadOption, match=r"a\.safetensors and b\.safetensors both hold one of 6 steps"):
        accelerate(pipe, tmp_path)
    made.save(tmp_path / "schedule.safetensors")
    assert schedules_in(tmp_path) == {6: made}


def test_a_damaged_schedule_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"schedule\.safetensors.*no such file"):
        accelerate(shared("flux"), tmp_path)
    data = bound(shared("flux"), hold("#.#.#.")).to_bytes()
    (tmp_path / "one.safetensors").write_bytes(data[:-8])
    with pytest.raises(DocumentError, match=r"one\.safetensors"):
        accelerate(shared("flux"), tmp_path)


def test_of_a_repository_only_files_called_schedule_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    made = schedules(shared("flux"))
    for steps, one in made.items():
        one.save(tmp_path / f"schedule-{steps}.safetensors")
    asked: list[tuple[str, Any]] = []

    def snapshot_download(repo: str, *, allow_patterns: Any) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert schedules_in("someone/flux") == made
    assert asked == [("someone/flux", ["schedule*.safetensors"])]
    accelerate(shared("flux"), "someone/flux")
    restore(shared("flux"))
    assert len(asked) == 2


def test_a_repository_that_cannot_be_listed_is_asked_for_the_default_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made = schedules(shared("flux"))[6]
    monkeypatch.setattr(hub, "folder", lambda *_: None)
    monkeypatch.setattr(CacheSchedule, "from_pretrained", lambda place: made)
    assert schedules_in("someone/flux") == {6: made}


# Schedule sets


def test_a_set_and_its_file_run_as_the_dictionary_does(tmp_path: Path) -> None:
    """Bit by bit, from the object, from a file of any name, and from a folder."""
    pipe = shared("flux")
    made = {6: bound(pipe, hold("#.#.#.")), 8: bound(pipe, hold("#..#..#."), site="block")}
    together = ScheduleSet(made)
    path = together.save(tmp_path / "flux.json")
    (tmp_path / "folder").mkdir()
    together.save(tmp_path / "folder" / ScheduleSet.FILENAME)
    wanted, plain = {}, {steps: run(pipe, call_of(steps)) for steps in made}
    with accelerated(pipe, made):
        for steps in made:
            wanted[steps] = run(pipe, call_of(steps))
            assert not torch.equal(wanted[steps], plain[steps])
    for source in (together, path, str(path), tmp_path / "folder"):
        with accelerated(pipe, source):
            for steps in (8, 6, 8):
                assert torch.equal(run(pipe, call_of(steps)), wanted[steps])
                assert report(pipe).schedule == made[steps]
                assert report(pipe).chosen.endswith(", of those for 6, 8 steps")
            with pytest.raises(ScheduleMismatch, match=r"no schedule is given for 7 steps\. Covered: 6, 8 steps"):
                run(pipe, call_of(7))
        assert estimate(pipe, source, **call_of(6)) == estimate(pipe, made[6], **call_of(6))
    assert not ours(pipe)


def test_a_set_of_one_names_the_steps_that_it_covers() -> None:
    pipe = shared("flux")
    with accelerated(pipe, ScheduleSet({6: bound(pipe, hold("#.#.#."))})):
        with pytest.raises(ScheduleMismatch, match="Covered: 6 steps"):
            run(pipe, call_of(7))
        run(pipe, call_of(6))
        assert report(pipe).predicted


def test_where_one_schedule_is_needed_a_set_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pipe = shared("flux")
    together = ScheduleSet({6: bound(pipe, hold("#.#.#."))})
    path = together.save(tmp_path / "flux.safetensors")
    for given in ({6: together}, {6: path}, {6: str(path)}):
        with pytest.raises((BadOption, DocumentError), match=r"Take one out: (schedules\[6\]|ScheduleSet\.load)"):
            accelerate(pipe, given)
    with pytest.raises(BadOption, match=r"Take one out: schedules\[6\]"):
        resampled(together, np.linspace(1, 0, 5))  # type: ignore[arg-type]
    with pytest.raises(BadOption, match=r"Take one out: schedules\[6\]"):
        correct(pipe, together, [call_of(6)])  # type: ignore[arg-type]
    assert not ours(pipe)


@pytest.mark.parametrize("name", ["flux.json", "flux.safetensors", "a/b.json"])
def test_a_text_that_ends_as_a_file_is_a_path(name: str) -> None:
    with pytest.raises(DocumentError, match=f"{name}.*no such file"):
        accelerate(shared("flux"), name)


def test_weights_do_not_depend_on_who_else_is_there() -> None:
    """A plan at the model is the same bits whether a plan of blocks is layered as well."""
    pipe = shared("flux")
    only = alone(pipe, "uniform:every=2", 6)
    with accelerated(pipe, {6: "uniform:every=2", 7: "uniform:every=2,sites=sublayer", 8: "full:sites=stack"}):
        assert torch.equal(run(pipe, call_of(6)), only)
        assert np.isclose(report(pipe).skipped, 0.5)
