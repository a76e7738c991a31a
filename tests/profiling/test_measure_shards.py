"""A measurement that is stopped, or shared by several processes, comes to the profile of one that was not."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import BATCH
from pipelines import TINY, fresh, shared
from processes import in_processes

from diffcache import measure
from diffcache.documents import Profile
from diffcache.errors import BadOption, DocumentError
from diffcache.patch import layer
from diffcache.profiling.measuring.resume import ABOUT
from diffcache.profiling.recording import all_shares

SITES = "stack,block"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = [str(HERE), str(ROOT / "tests" / "helpers"), str(ROOT)]


def calls(name: str, count: int = 3) -> list[dict[str, Any]]:
    """Of several sizes, so that what is mixed up is seen."""
    return [
        TINY[name].call(shared(name), batch=BATCH - k % 2)
        | {"generator": [torch.Generator().manual_seed(10 * k + s) for s in range(BATCH - k % 2)]}
        for k in range(count)
    ]


def without_times(profile: Profile) -> Profile:
    denoisers = {
        name: dataclasses.replace(
            denoiser, sites={s: dataclasses.replace(one, seconds=0.0) for s, one in denoiser.sites.items()}
        )
        for name, denoiser in profile.denoisers.items()
    }
    return dataclasses.replace(profile, denoisers=denoisers, seconds=0.0)


class StoppedError(Exception):
    pass


def stop_after(pipe: Any, loops: int) -> Callable[[], None]:
    """The noise scheduler's first step after that many loops fails."""
    begun = [0]

    def bar(inner: Any, *args: Any, **kwargs: Any) -> Any:
        begun[0] += 1
        if begun[0] > loops:
            raise StoppedError
        return inner(*args, **kwargs)

    return layer(pipe, "progress_bar", bar)


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
@pytest.mark.parametrize("loops", [1, 2])
def test_a_measurement_that_was_stopped_goes_on_to_the_same_profile(name: str, loops: int, tmp_path: Path) -> None:
    pipe = fresh(name)
    whole = measure(pipe, calls(name), sites=SITES)
    undo = stop_after(pipe, loops)
    with pytest.raises(StoppedError):
        measure(pipe, calls(name), sites=SITES, resume=tmp_path / "part")
    undo()
    assert len(list((tmp_path / "part").glob("call-*"))) == loops
    ran: list[int] = []
    undo = layer(pipe, "progress_bar", lambda inner, *a, **k: (ran.append(1), inner(*a, **k))[1])
    resumed = measure(pipe, calls(name), sites=SITES, resume=tmp_path / "part")
    assert len(ran) == 3 - loops  # what was there is not run again
    assert without_times(resumed).to_bytes() == without_times(whole).to_bytes()
    again = measure(pipe, calls(name), sites=SITES, resume=tmp_path / "part")
    undo()
    assert len(ran) == 3 - loops
    assert again.to_bytes() == resumed.to_bytes()  # times included


def test_a_generator_shared_by_calls_goes_on_where_it_was(tmp_path: Path) -> None:
    pipe, name = fresh("flux"), "flux"

    def made() -> list[dict[str, Any]]:
        one = torch.Generator().manual_seed(3)
        return [TINY[name].call(pipe) | {"generator": one} for _ in range(3)]

    whole = measure(pipe, made())
    undo = stop_after(pipe, 2)
    with pytest.raises(StoppedError):
        measure(pipe, made(), resume=tmp_path)
    undo()
    drawn = made()
    found = drawn[0]["generator"].get_state()
    assert without_times(measure(pipe, drawn, resume=tmp_path)) == without_times(whole)
    assert torch.equal(drawn[0]["generator"].get_state(), found)  # and is left where it was found


def test_the_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    pipe = fresh("flux")
    made = [TINY["flux"].call(pipe)] * 3  # no generator: equal calls, other noise
    torch.manual_seed(5)
    whole = measure(pipe, made)
    torch.manual_seed(5)
    undo = stop_after(pipe, 2)
    with pytest.raises(StoppedError):
        measure(pipe, made, resume=tmp_path)
    undo()
    torch.manual_seed(99)
    assert without_times(measure(pipe, made, resume=tmp_path)) == without_times(whole)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pipelines import fresh
from test_measure_shards import calls, SITES
from diffcache import measure
from diffcache.patch import layer
pipe, begun = fresh("dit"), []
def bar(inner, *args, **kwargs):
    begun.append(1)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)
layer(pipe, "progress_bar", bar)
measure(pipe, calls("dit"), sites=SITES, resume={folder!r})
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_to_go_on_from(tmp_path: Path) -> None:
    script = KILLED.format(paths=PATHS, folder=str(tmp_path / "part"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "part").glob("call-*"))) == 2
    resumed = measure(shared("dit"), calls("dit"), sites=SITES, resume=tmp_path / "part")
    assert without_times(resumed) == without_times(measure(shared("dit"), calls("dit"), sites=SITES))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    pipe = shared("flux")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"")
    with pytest.raises(BadOption, match=r"pictures'.*a new or an empty folder.*no measurement\.json"):
        measure(pipe, calls("flux", 1), resume=tmp_path / "pictures")
    with pytest.raises(BadOption, match="a folder, or a path where one can be made"):
        measure(pipe, calls("flux", 1), resume=tmp_path / "pictures" / "cat.png")
    measure(pipe, calls("flux", 1), resume=tmp_path / "one")
    with pytest.raises(BadOption, match=r"with sites model.*has sites model, block"):
        measure(pipe, calls("flux", 1), sites="block", resume=tmp_path / "one")
    other = fresh("flux")
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.01)
    with pytest.raises(BadOption, match="with transformer weights"):
        measure(other, calls("flux", 1), resume=tmp_path / "one")
    with pytest.raises(BadOption, match=r"with pipeline FluxPipeline.*has pipeline DiTPipeline"):
        measure(shared("dit"), calls("dit", 1), resume=tmp_path / "one")
    (tmp_path / "one" / ABOUT).write_text("{")
    with pytest.raises(DocumentError, match=r"cannot be read.*begin anew"):
        measure(pipe, calls("flux", 1), resume=tmp_path / "one")


def test_other_calls_are_measured_and_damaged_files_reported(tmp_path: Path) -> None:
    pipe = shared("flux")
    measure(pipe, calls("flux", 2), resume=tmp_path)
    measure(pipe, calls("flux", 3), resume=tmp_path)
    files = sorted(tmp_path.glob("call-*"))
    assert len(files) == 3
    changed = calls("flux", 3)
    changed[2]["generator"][0].manual_seed(77)
    measure(pipe, changed, resume=tmp_path)
    assert len(list(tmp_path.glob("call-*"))) == 4
    changed[2]["guidance_scale"] = 1.25
    measure(pipe, changed, resume=tmp_path)
    assert len(list(tmp_path.glob("call-*"))) == 5
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DocumentError, match=r"call-.*damaged"):
        measure(pipe, calls("flux", 3), resume=tmp_path)


def test_arguments_that_could_not_be_known_again_are_refused(tmp_path: Path) -> None:
    pipe = shared("flux")
    (call,) = calls("flux", 1)
    with pytest.raises(BadOption, match=r"an argument of type object.*without resume"):
        measure(pipe, [call | {"joint_attention_kwargs": {"x": object()}}], resume=tmp_path)


# ------------------------------------------------------------------- processes


def test_every_process_gets_all_shares_by_rank(tmp_path: Path) -> None:
    shares = [b"first" * 1000, b"", bytes(range(256))]
    assert in_processes(3, lambda _: all_shares(lambda rank, size: shares[rank]), tmp_path) == [shares] * 3


def test_a_process_that_fails_makes_all_fail_with_its_reason(tmp_path: Path) -> None:
    def share(rank: int, size: int) -> bytes:
        if rank == 1:
            raise BadOption("height", 7, "8 and more")
        return b"found"

    first, second = in_processes(2, lambda _: all_shares(share), tmp_path)
    assert first == (
        "DiffCacheError: process 1 of 2 could not measure its share of the calls: "
        "BadOption: height=7 was given. Allowed: 8 and more."
    )
    assert second == "BadOption: height=7 was given. Allowed: 8 and more."


def test_without_processes_there_is_one_share() -> None:
    assert all_shares(lambda rank, size: f"{rank} of {size}".encode()) == [b"0 of 1"]


@pytest.mark.parametrize(("name", "count", "processes"), [("sd3", 3, 2), ("wan", 5, 2), ("flux", 2, 3)])
def test_several_processes_come_to_the_profile_of_one(name: str, count: int, processes: int, tmp_path: Path) -> None:
    pipe = shared(name)

    def job(rank: int) -> tuple[int, bytes]:
        ran: list[int] = []
        layer(pipe, "progress_bar", lambda inner, *a, **k: (ran.append(1), inner(*a, **k))[1])
        profile = measure(pipe, calls(name, count), sites=SITES)
        return len(ran), profile.to_bytes()

    loops, found = zip(*in_processes(processes, job, tmp_path), strict=True)
    assert list(loops) == [len(range(rank, count, processes)) for rank in range(processes)]
    assert found == found[:1] * processes
    ours = without_times(Profile.from_bytes(found[0]))
    theirs = without_times(measure(pipe, calls(name, count), sites=SITES))
    assert ours.samples == theirs.samples
    assert ours.dynamics is not None
    assert theirs.dynamics is not None
    assert np.array_equal(ours.dynamics.grams, theirs.dynamics.grams)  # the same order of samples
    assert np.array_equal(ours.dynamics.peaks, theirs.dynamics.peaks)
    assert np.array_equal(ours.dynamics.response, theirs.dynamics.response)
    mine, others = (dict(p.denoisers["transformer"].sites) for p in (ours, theirs))
    assert mine.keys() == others.keys()
    for site, one in mine.items():
        for tables in ("output", "residual"):
            for table in ("l1", "relative_l1", "gram"):
                a, b = (getattr(getattr(s, tables), table) for s in (one, others[site]))
                assert np.abs(a - b).max() <= 1e-12 * np.abs(b).max()
        for row in ("residual_ratio", "input_change"):
            a, b = (getattr(s, row) for s in (one, others[site]))
            assert np.abs(a - b).max() <= 1e-12 * np.abs(b).max()
        assert np.array_equal(one.influence, others[site].influence)
    assert ours.provenance == theirs.provenance


def test_processes_go_on_in_one_folder(tmp_path: Path) -> None:
    """This holds for every number of processes."""
    pipe = shared("flux")
    whole = measure(pipe, calls("flux", 4), resume=tmp_path / "part")
    (tmp_path / "part" / sorted(p.name for p in (tmp_path / "part").glob("call-*"))[1]).unlink()
    found = in_processes(2, lambda _: measure(pipe, calls("flux", 4), resume=tmp_path / "part").to_bytes(), tmp_path)
    assert found[0] == found[1]
    again = Profile.from_bytes(found[0])
    assert again.dynamics == whole.dynamics
    assert len(list((tmp_path / "part").glob("call-*"))) == 4


def test_calls_that_share_a_generator_are_refused_where_processes_share_the_calls(tmp_path: Path) -> None:
    pipe, one = shared("flux"), torch.Generator().manual_seed(0)
    made = [TINY["flux"].call(pipe) | {"generator": one} for _ in range(2)]
    for told in in_processes(2, lambda _: measure(pipe, made), tmp_path):
        assert "calls 0 and 1 share a generator" in told
        assert "Give each call a different generator" in told


SHARE = """
import os, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pipelines import shared
from test_measure_shards import calls
from diffcache import measure
from diffcache.profiling.recording.shards import all_shares
for n in range(20):  # the group is made and taken down each time
    assert all_shares(lambda rank, size: bytes([rank, n])) == [bytes([rank, n]) for rank in range(2)]
for _ in range(2):
    found = measure(shared("dit"), calls("dit"), influence=False)
found.save({folder!r} + "/rank" + os.environ["RANK"] + ".safetensors")
"""


@pytest.mark.slow
def test_under_torchrun_nothing_has_to_be_set_up(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SHARE.format(paths=PATHS, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (Profile.load(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.to_bytes() == second.to_bytes()
    assert first.samples == 5
    theirs = measure(shared("dit"), calls("dit")).dynamics
    assert first.dynamics is not None
    assert theirs is not None
    assert np.array_equal(first.dynamics.grams, theirs.grams)
