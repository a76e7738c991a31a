"""The schedule set: one file with schedules for several numbers of steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import forge, hold, profile, schedule
from safetensors import numpy as safetensors
from test_reprs import Tags

from diffcache.documents import CacheSchedule, DenoiserPlan, Online, ScheduleSet, container
from diffcache.documents.collection import read_schedules, schedules_in
from diffcache.documents.schedule_set import demand_one
from diffcache.errors import BadOption, DocumentError

pytestmark = pytest.mark.fast


def made(mask: str, name: str = "transformer", **network: str | None) -> CacheSchedule:
    """A schedule of one network, for as many steps as the mask has."""
    return CacheSchedule(steps=len(mask), denoisers={name: DenoiserPlan(sites={"model": hold(mask)}, **network)})


FOUR, SIX = made("■·■·", class_name="Net"), made("■··■··", class_name="Net")
BOTH = ScheduleSet({6: SIX, 4: FOUR})


def test_a_set_is_a_sorted_mapping_from_steps_to_schedules() -> None:
    assert list(BOTH) == [4, 6]
    assert len(BOTH) == 2
    assert BOTH[4] == FOUR
    assert BOTH[np.int64(6)] == SIX
    assert 6 in BOTH
    assert 5 not in BOTH
    assert dict(BOTH.schedules) == {4: FOUR, 6: SIX}
    assert ScheduleSet({np.int64(4): FOUR, 6: SIX}) == BOTH == ScheduleSet.of(SIX, FOUR)
    assert ScheduleSet({4: FOUR}) != BOTH
    with pytest.raises(TypeError):
        BOTH.schedules[8] = FOUR  # type: ignore[index]


@pytest.mark.parametrize("steps", [5, True, "4", 0])
def test_steps_that_a_set_lacks_are_refused_with_those_that_it_has(steps: Any) -> None:
    with pytest.raises(BadOption, match=r"Allowed: 4, 6, the numbers of steps"):
        BOTH[steps]


def test_a_file_keeps_the_set_bit_by_bit(tmp_path: Path) -> None:
    whole = schedule()  # every field is in use
    every = ScheduleSet.of(whole, dataclasses.replace(made("■·"), provenance={"note": "ü"}))
    path = every.save(tmp_path / "mine.json")  # the name does not matter
    read = ScheduleSet.load(path)
    assert read == every
    assert read[whole.steps].digest() == whole.digest()
    assert read[whole.steps].to_bytes() == whole.to_bytes()
    assert read.to_bytes() == path.read_bytes() == every.to_bytes()
    assert read.digest() == every.digest() != ScheduleSet.of(whole).digest()
    assert copy.deepcopy(every) == pickle.loads(pickle.dumps(every)) == every
    every.save(tmp_path / ScheduleSet.FILENAME)
    assert ScheduleSet.from_pretrained(tmp_path) == every


def test_the_bytes_of_version_1_do_not_change() -> None:
    """A new version of schedules needs a new version of sets, with an upgrade for the schedules inside."""
    assert (ScheduleSet.VERSION, CacheSchedule.VERSION) == (1, 3)
    assert BOTH.digest() == "718ee570474315a6574051ae821fbc54291354cea7310fd75af5ee97f1c4a99f"
    tree, arrays = container.unpack("x", BOTH.to_bytes())
    assert tree.keys() == {"format", "version", "library", "schedules"}
    assert list(tree["schedules"]) == ["4", "6"]
    assert sorted(arrays) == [f"{n}/transformer/model/{name}" for n in (4, 6) for name in ("compute", "weights")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([FOUR, SIX], "found list. Allowed: a mapping, number of steps -> CacheSchedule"),
        (FOUR, "found CacheSchedule"),
        ({}, "found none"),
        ({"4": FOUR}, "found '4'. Allowed: a whole number"),
        ({True: FOUR}, "found True"),
        ({4.0: FOUR}, "found 4.0"),
        ({0: FOUR}, "found 0. Allowed: a whole number, at least 1"),
        ({-4: FOUR}, "found -4"),
        ({5: FOUR}, "found a schedule of 4 steps. Allowed: a schedule of 5 steps"),
        ({4: "uniform:every=2"}, "field 'schedules/4': found str. Allowed: CacheSchedule"),
        ({4: profile()}, "found Profile. Allowed: CacheSchedule"),
        ({4: BOTH}, "found ScheduleSet. Allowed: CacheSchedule"),
    ],
)  # fmt: skip
def test_other_content_is_refused(given: Any, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        ScheduleSet(given)
    assert says in str(caught.value)


def test_two_schedules_of_the_same_steps_are_refused() -> None:
    with pytest.raises(DocumentError, match="found two of 4 steps"):
        ScheduleSet.of(FOUR, SIX, made("■■■·"))
    with pytest.raises(DocumentError, match="found none"):
        ScheduleSet.of()
    with pytest.raises(DocumentError, match="found str"):
        ScheduleSet.of("uniform")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "field", "says"),
    [
        (made("■··■··", class_name="Other"), "6/transformer/class_name", "found Other. Allowed: Net, as in the"),
        (made("■··■··", class_name="Net", config_digest="b" * 64), "6/transformer/config_digest", "a" * 64),
        (made("■··■··", "unet"), "6/denoisers", "found plans for unet. Allowed: plans for transformer"),
    ],
)
def test_schedules_of_different_networks_are_refused(other: CacheSchedule, field: str, says: str) -> None:
    first = made("■·■·", class_name="Net", config_digest="a" * 64)
    with pytest.raises(DocumentError) as caught:
        ScheduleSet({4: first, 6: other})
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "schedule of 4 steps" in str(caught.value)
    assert len(ScheduleSet({4: first, 6: made("■··■··")})) == 2  # it fits any network


def renamed(tree: dict[str, Any], arrays: dict[str, np.ndarray], old: str, new: str) -> None:
    tree["schedules"][new] = tree["schedules"].pop(old)
    for name in list(arrays):
        if name.startswith(f"{old}/"):
            arrays[new + name[len(old) :]] = arrays.pop(name)


@pytest.mark.parametrize("key", ["06", "+6", " 6", "6.0", "six", "٦", "6" * 5000, "-6", "1e1"])
def test_a_file_with_another_spelling_of_a_number_is_refused(tmp_path: Path, key: str) -> None:
    path = forge(BOTH, tmp_path / "set", lambda tree, arrays: renamed(tree, arrays, "6", key))
    with pytest.raises(DocumentError, match="found the key") as caught:
        ScheduleSet.load(path)
    assert caught.value.field == "schedules"
    assert len(str(caught.value)) < 600


def test_a_file_with_a_number_twice_or_zero_is_refused(tmp_path: Path) -> None:
    tree, arrays = container.unpack("x", BOTH.to_bytes())
    text = json.dumps(tree).replace('"6": ', '"4": ')
    assert text.count('"4": ') == 2
    path = tmp_path / "set"
    path.write_bytes(safetensors.save(arrays, metadata={"diffcache": text}))
    with pytest.raises(DocumentError, match="same key twice"):
        ScheduleSet.load(path)
    with pytest.raises(DocumentError, match=r"found 0\. Allowed: a whole number, at least 1"):
        ScheduleSet.load(forge(BOTH, path, lambda tree, arrays: renamed(tree, arrays, "4", "0")))


def test_an_error_inside_names_the_schedule(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(DocumentError) as caught:
        ScheduleSet.load(forge(BOTH, path, lambda tree, _: tree["schedules"]["6"].update(steps=7)))
    assert caught.value.field == "6/transformer/model/compute"
    with pytest.raises(DocumentError) as caught:
        ScheduleSet.load(forge(BOTH, path, lambda tree, _: tree["schedules"]["6"].pop("sigmas")))
    assert caught.value.field == "6/sigmas"
    with pytest.raises(DocumentError, match="Allowed: an object"):
        ScheduleSet.load(forge(BOTH, path, lambda tree, _: tree.update(schedules=[])))


def test_a_set_with_a_criterion_of_another_package_is_not_written() -> None:
    plan = DenoiserPlan(sites={"model": hold("■·■·")}, online=Online(rule="a.b:c", limit=np.ones(4)))
    with pytest.raises(DocumentError, match="a file cannot name code to import"):
        ScheduleSet({4: CacheSchedule(steps=4, denoisers={"transformer": plan})}).to_bytes()


def test_each_reader_says_which_one_reads_the_other_file(tmp_path: Path) -> None:
    BOTH.save(tmp_path / "set")
    FOUR.save(tmp_path / "one")
    with pytest.raises(DocumentError, match=r"several numbers of steps\. Take one out: ScheduleSet\.load"):
        CacheSchedule.load(tmp_path / "set")
    with pytest.raises(DocumentError, match=r"holds one schedule: read it with CacheSchedule\.load"):
        ScheduleSet.load(tmp_path / "one")
    assert read_schedules(tmp_path / "set") == BOTH
    assert read_schedules(str(tmp_path / "one")) == FOUR
    with pytest.raises(DocumentError, match="no such file"):
        read_schedules(tmp_path / "missing")


def test_where_one_schedule_is_needed_the_error_says_how_to_take_it_out() -> None:
    assert demand_one("schedule", FOUR) == FOUR
    with pytest.raises(BadOption, match=r"a ScheduleSet, for 4, 6 steps.* Take one out: schedules\[4\]"):
        demand_one("schedule", BOTH)
    with pytest.raises(BadOption, match="Allowed: a CacheSchedule"):
        demand_one("schedule", {4: FOUR})


def test_a_folder_may_hold_sets_and_schedules(tmp_path: Path) -> None:
    BOTH.save(tmp_path / ScheduleSet.FILENAME)
    assert schedules_in(tmp_path) == {4: FOUR, 6: SIX}
    eight = made("■···■···")
    eight.save(tmp_path / "eight.safetensors")
    assert list(schedules_in(tmp_path)) == [4, 6, 8]
    other = made("■■■·")
    other.save(tmp_path / "four.safetensors")
    with pytest.raises(BadOption, match=r"four\.safetensors and schedules\.safetensors both hold one of 4 steps"):
        schedules_in(tmp_path)
    other.save(tmp_path / CacheSchedule.FILENAME)
    (tmp_path / "four.safetensors").unlink()
    assert schedules_in(tmp_path)[4] == other


def test_a_set_describes_itself() -> None:
    assert repr(BOTH) == "<ScheduleSet 2 of 4 steps, 2 of 6 steps, Net>"
    many = ScheduleSet.of(*(made("■" + "·" * n) for n in range(1, 50)))
    assert repr(many) == "<ScheduleSet 49 schedules of 2 to 50 steps, transformer>"
    assert repr(ScheduleSet({4: made("■■■■")})) == "<ScheduleSet 4 of 4 steps, transformer>"
    text = str(BOTH)
    assert text.startswith("2 schedules, for runs of 4, 6 steps\n\n4 steps\n  2 of 4 steps computed\n")
    for one in (FOUR, SIX):
        assert all(f"  {line}" in text.splitlines() for line in one.describe().splitlines())
    page = BOTH._repr_html_()
    assert Tags(page).open == []
    assert "2 schedules, for runs of 4, 6 steps" in page
    assert "■··■··" in page
