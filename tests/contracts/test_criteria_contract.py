"""The contract of every criterion. The tests walk the folder, so that a new file is held to it without being named.

The second half plants criteria in a package outside of the library and runs them on a tiny pipeline.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online import HUGE, STEPS, decided, denoised, played, stacks, strips
from pipelines import TINY, run, shared
from planted_criteria import tensors, toy
from probes import dicts, hold, names, ours
from small_loop import STEPS as TOY_STEPS
from small_loop import loop, noise

from diffcache import CacheSchedule, accelerate, accelerated, estimate, registry, report, restore
from diffcache.errors import BadOption, DocumentError, UnknownName
from diffcache.executor import Store, criteria
from diffcache.executor.criteria import OPTIONAL, About, Memory, Signal, Where
from diffcache.executor.store import AS_IT_IS
from diffcache.profiling.calibration import correct
from diffcache.schedulers import Rule

PACKAGE = Path(criteria.__file__).parents[2]
NAMES = criteria.available()
LEVELS = np.linspace(0.9, 0.1, 5)  # shares of noise
SAVED = ("drift", "first_block", "modulated_input", "output_rate")  # the names in schedules that are saved already

every_name = pytest.mark.parametrize("name", NAMES)


def memory_of(name: str, store: Store) -> Memory:
    """A memory in which a criterion can compare: two computed steps were observed."""
    criterion, memory = criteria.load(name), Memory(store, "net", 0)
    for seed in (1, 2):
        criterion.observe(memory, tensors(seed), tensors(seed + 10))
    return memory


# --- what a file holds -----------------------------------------------------------------------------------------------


def test_the_names_in_saved_schedules_are_there() -> None:
    assert set(SAVED) <= set(NAMES)


@every_name
def test_it_names_its_source_and_says_in_one_line_what_it_does(name: str) -> None:
    first, *rest = (registry.load(criteria.__name__, name).__doc__ or "").strip().split("\n")
    assert first.endswith(".")
    assert not rest or not rest[0], "one line, then an empty one"
    assert criteria.load(name).about.source


@every_name
def test_its_functions_take_what_the_executor_passes(name: str) -> None:
    module = registry.load(criteria.__name__, name)
    wanted = {f: list(inspect.signature(getattr(criteria.load("drift"), f)).parameters) for f in ("change", *OPTIONAL)}
    for function, parameters in wanted.items():
        if hasattr(module, function):
            taken = inspect.signature(getattr(module, function)).parameters.values()
            assert [p.name for p in taken if p.kind is not p.KEYWORD_ONLY] == parameters


@every_name
def test_it_holds_nothing_public_outside_of_the_contract(name: str) -> None:
    """A misspelt optional function would never be called."""
    module = registry.load(criteria.__name__, name)
    own = {n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    assert {n for n in own if not n.startswith("_")} <= {"change", *OPTIONAL}


# --- what its functions return ---------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_change_is_one_finite_number_and_zero_where_nothing_moved(name: str, dtype: torch.dtype) -> None:
    criterion, memory = criteria.load(name), memory_of(name, Store())
    assert criterion.ready(memory)
    now, then = criterion.signal(tensors(3, dtype)), criterion.signal(tensors(4, dtype))
    moved = criterion.change(Signal(3, now, then, AS_IT_IS, levels=LEVELS), memory)
    assert moved.shape == ()
    assert 0 < float(moved) < float("inf")
    assert float(criterion.change(Signal(3, now, now, AS_IT_IS, levels=LEVELS), memory)) == 0


@every_name
def test_it_keeps_as_many_bytes_as_it_says(name: str) -> None:
    store = Store()
    memory_of(name, store)
    kept = criteria.load(name).keeps(tensors(2), tensors(12))
    assert store.bytes == sum(t.nbytes for t in kept)
    meta = [t.to("meta") for t in (*tensors(2), *tensors(12))]
    assert sum(t.nbytes for t in criteria.load(name).keeps(meta[:1], meta[1:])) == store.bytes


@every_name
def test_parameters_that_it_does_not_use_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load(criteria.__name__, name)
    pipe = shared("flux")
    values: dict[str, Any] = {"polynomial": np.array([1.0, 0.0]), "most": 2}
    for parameter in criteria.PARAMETERS:
        schedule = decided(pipe, name, **{parameter: values[parameter]})
        if parameter in module.ABOUT.parameters:
            restore(accelerate(pipe, schedule))
        with monkeypatch.context() as patch:
            patch.setattr(module, "ABOUT", dataclasses.replace(module.ABOUT, parameters=()))
            with pytest.raises(DocumentError, match=f"transformer/online/{parameter}.*does not use it"):
                accelerate(pipe, schedule)
    assert ours(pipe) == []


# --- in a run --------------------------------------------------------------------------------------------------------


def places(pipe: Any, name: str) -> list[str]:
    return ["model"] if criteria.load(name).about.where is Where.MODEL else stacks(pipe)


@every_name
def test_it_skips_under_a_high_limit_and_nothing_under_a_limit_of_zero(name: str) -> None:
    pipe = shared("flux")
    sites = places(pipe, name)
    _, most = played("flux", decided(pipe, name, HUGE, sites=sites))
    output, none = played("flux", decided(pipe, name, 0.0, sites=sites))
    assert most.skipped > 0
    assert most.online == {"transformer": name}
    assert none.skipped == 0
    assert torch.equal(output, run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS))


@every_name
@pytest.mark.parametrize("store", ["exact", "int8"])
def test_the_estimate_knows_its_memory(name: str, store: str) -> None:
    pipe = shared("flux")
    schedule = decided(pipe, name, 0.4, sites=places(pipe, name)).stored(store)
    before = estimate(pipe, schedule, **{**TINY["flux"].call(pipe), "num_inference_steps": STEPS})
    _, found = played("flux", schedule)
    assert before.cache_bytes == found.peak_bytes


@every_name
def test_several_anchors_need_a_criterion_that_keeps_the_anchors_of_the_plan(name: str) -> None:
    pipe = loop()
    mask = "##" + "." * (TOY_STEPS - 2)
    weights = np.zeros((1, TOY_STEPS, 2))
    weights[:, 2:] = (2.0, -1.0)
    plan = dataclasses.replace(hold(mask), weights=weights)
    assert plan.anchors == 2
    schedule = toy(name, plan=plan)
    if criteria.load(name).about.keeps_anchors:
        restore(accelerate(pipe, schedule))
        return
    words = f"'transformer/model/weights': found 2 anchors under the online rule '{name}'|2 anchors under the online"
    with pytest.raises(DocumentError, match=words):
        accelerate(pipe, schedule)
    with pytest.raises(DocumentError, match=words):
        estimate(pipe, schedule, x=noise())
    assert ours(pipe) == []


# --- no other file knows a name --------------------------------------------------------------------------------------


def comparisons(root: Path) -> list[str]:
    """Comparisons of anything with the name of a criterion, outside of the criteria and the schedulers."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if not {"criteria", "schedulers"} & set(path.relative_to(root).parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                inside = ast.walk(node) if isinstance(node, ast.Compare | ast.MatchValue) else ()
                if any(isinstance(n, ast.Constant) and n.value in NAMES for n in inside):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def test_no_file_outside_of_the_folder_compares_a_name() -> None:
    assert comparisons(PACKAGE) == []


@pytest.mark.parametrize("code", ["x = rule == 'drift'", "x = rule not in ('drift', 'output_rate')"])
def test_a_planted_comparison_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "planted.py").write_text(code)
    assert comparisons(tmp_path) == ["planted.py:1"]


# --- the facts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"where": "model"},
        {"parameters": ("threshold",)},
        {"keeps_anchors": True, "accumulates": True},
        {"keeps_anchors": True, "where": Where.FIRST_BLOCK},
    ],
)
def test_facts_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        About(**{"source": "a test", "where": Where.MODEL} | fields)


# --- criteria of another package -------------------------------------------------------------------------------------

ADDRESSES = [f"planted_of_tests:{name}" for name in ("Largest", "Half", "Observed")]


def foreign(pipe: Any, address: str, limit: float = HUGE, **options: Any) -> CacheSchedule:
    return decided(pipe, address, limit, sites=places(pipe, address), **options)


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("store", ["exact", "int8"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_criterion_of_another_package_drives_a_run(address: str, store: str) -> None:
    pipe = shared("flux")
    call = {**TINY["flux"].call(pipe), "num_inference_steps": STEPS}
    expected = run(pipe, call)
    before = names(pipe)
    schedule = foreign(pipe, address).stored(store)
    foreseen = estimate(pipe, schedule, **call)
    assert foreseen.online
    assert foreseen.compute_fraction < 1
    assert 0 < foreseen.predicted <= foreseen.asked
    accelerate(pipe, schedule)
    run(pipe, call)
    found = report(pipe)
    assert found.predicted > 0
    assert found.online == {"transformer": address}
    assert f"transformer: decided in the run by {address}" in str(found)
    assert not found.notices or {n.kind for n in found.notices} == {"mostly-skipped"}
    assert foreseen.cache_bytes == found.peak_bytes
    restore(pipe)
    assert names(pipe) == before
    assert ours(pipe) == []
    assert torch.equal(run(pipe, call), expected)


@pytest.mark.usefixtures("planted")
def test_tensors_that_it_does_not_declare_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is then smaller than the run: the test above compares something."""
    import planted_of_tests

    monkeypatch.setattr(planted_of_tests.Observed, "keeps", lambda x, output: ())
    with pytest.raises(AssertionError):
        test_a_criterion_of_another_package_drives_a_run("planted_of_tests:Observed", "exact")
    restore(shared("flux"))


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("address", ADDRESSES)
def test_with_a_limit_of_zero_it_changes_no_bit(address: str) -> None:
    pipe = shared("flux")
    output, found = played("flux", foreign(pipe, address, 0.0))
    assert found.predicted == 0
    assert torch.equal(output, run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS))


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("address", "factor"), [("planted_of_tests:Largest", 1), ("planted_of_tests:TWICE", 2)])
def test_its_decisions_are_those_of_a_plain_loop_over_its_signal(address: str, factor: float) -> None:
    pipe, limit = shared("flux"), 0.3
    with denoised(pipe.transformer) as calls:
        _, found = played("flux", foreign(pipe, address, limit, most=3))
    (strip,) = strips(found, "model")
    inputs = [x for x, _ in calls]
    assert strip == largest(inputs, limit / factor, most=3)
    assert strip != largest(inputs, limit * 2 / factor, most=9), "every limit decides alike: nothing was compared"
    assert {"■", "·"} == set(strip[1:])


def largest(inputs: Sequence[np.ndarray], limit: float, most: int) -> str:
    """The strip of the planted criterion ``Largest``."""
    strip, newest = "■", inputs[0]
    for now in inputs[1:]:
        below = np.abs(now - newest).max() / np.abs(newest).max() < limit
        strip += "·" if below and not strip.endswith("·" * most) else "■"
        newest = now if strip[-1] == "■" else newest
    return strip


@pytest.mark.usefixtures("planted")
def test_a_rule_of_another_package_can_leave_its_decisions_to_it() -> None:
    pipe = loop()
    with accelerated(pipe, Rule("planted_of_tests:Chosen", options={"limit": HUGE})):
        pipe(noise())
        found = report(pipe)
    assert found.online == {"transformer": "planted_of_tests:Largest"}
    assert found.predicted == TOY_STEPS - 1


@pytest.mark.usefixtures("planted")
def test_what_it_does_not_accept_is_refused_before_the_run() -> None:
    pipe = loop()
    with pytest.raises(BadOption, match="limit=77"):
        accelerate(pipe, toy("planted_of_tests:Largest", 77.0))
    schedule = decided(shared("flux"), "planted_of_tests:Largest", sites=["model"], polynomial=np.array([1.0, 0.0]))
    with pytest.raises(DocumentError, match="transformer/online/polynomial"):
        accelerate(shared("flux"), schedule)
    assert ours(pipe) == []


# --- names that lead to no criterion ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("magcache", f"no criterion called 'magcache'. Known: {', '.join(NAMES)}."),
        ("drifts", "Did you mean 'drift'?"),
        ("_about", "no criterion called '_about'"),
        ("planted_of_tests:Missing", "Module 'planted_of_tests' has no 'Missing'"),
        ("planted_of_tests:Nothing", "A criterion has ABOUT, an About, and change(), a function."),
        ("absent_of_tests:Largest", "There is no module 'absent_of_tests'"),
    ],
)
def test_a_name_that_leads_to_none_is_refused_before_the_first_step(rule: str, words: str) -> None:
    pipe = loop()
    before = dicts(pipe)
    for refused in (
        lambda: accelerate(pipe, toy(rule)),
        lambda: estimate(pipe, toy(rule), x=noise()),
        lambda: correct(pipe, toy(rule), [{"x": noise()}]),
    ):
        with pytest.raises(UnknownName) as error:
            refused()
        assert words in str(error.value)
        assert ", ".join(NAMES) in str(error.value)
    assert pipe.transformer.seen == []
    assert dicts(pipe) == before


def test_a_file_with_a_name_of_a_later_version_is_read_and_not_run(tmp_path: Path) -> None:
    path = toy("of_a_later_version").save(tmp_path / "schedule.safetensors")
    assert CacheSchedule.load(path).denoisers["transformer"].online is not None
    pipe = loop()
    with pytest.raises(UnknownName, match="no criterion called 'of_a_later_version'"):
        accelerate(pipe, path)
    assert pipe.transformer.seen == []


@pytest.mark.usefixtures("planted")
def test_no_file_leads_to_code_of_another_package(tmp_path: Path) -> None:
    """The address is refused when the file is read, and nothing is imported."""
    schedule = toy("planted_of_tests:Largest")
    with pytest.raises(DocumentError, match=r"transformer/online/rule.*a file cannot name code to import"):
        schedule.save(tmp_path / "mine.safetensors")
    assert list(tmp_path.glob("*.safetensors")) == []
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(schedule._pack(library="forged"))
    for read in (
        lambda: CacheSchedule.load(forged),
        lambda: CacheSchedule.from_bytes(forged.read_bytes()),
        lambda: accelerate(loop(), forged),
        lambda: estimate(loop(), str(forged), x=noise()),
    ):
        with pytest.raises(DocumentError, match=r"found 'planted_of_tests:Largest'.*a file cannot name code to import"):
            read()
    assert "planted_of_tests" not in sys.modules


@pytest.mark.usefixtures("planted")
def test_a_schedule_in_memory_keeps_the_address() -> None:
    """Copies and pickles of a schedule are made by code, not read from a document."""
    schedule = toy("planted_of_tests:Largest")
    assert copy.deepcopy(schedule) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert len(schedule.digest()) == 64
