"""Mutants of every file that is read are taken or refused with the documented error; kills and races leave whole files.

``--fuzz=N`` tries seeds 0 to N - 1 of everything.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
import torch
from documents import profile, schedule, token_profile, token_schedule
from evaluations import evaluation
from pipelines import TINY, shared

from diffcache import measure
from diffcache.documents import ScheduleSet, container, files
from diffcache.errors import BadOption, DocumentError
from diffcache.eval.evaluation import again
from diffcache.eval.plausible import Due
from diffcache.eval.record import read as read_record
from diffcache.eval.reference import ReferenceStatistics
from diffcache.eval.saved_parts import EvaluationFolder, Exact
from diffcache.profiling import router_file
from diffcache.profiling.measuring.partial_profile import PartialProfile
from diffcache.profiling.measuring.plausible import demand_sound
from diffcache.schedulers.learning_to_cache import plan

REFERENCE = ReferenceStatistics(mean=np.zeros(2), covariance=np.eye(2), samples=9, extractor="x", settings="0" * 64)


def taken(read: Callable[..., object], *args: object, **options: object) -> bool:
    """Whether ``read`` took what it was given. If not, it raised a documented error, one line that shows."""
    try:
        read(*args, **options)
    except (DocumentError, BadOption) as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    assert len(message) < 2000
    return False


SET = ScheduleSet.of(schedule())


@pytest.mark.parametrize(
    "document",
    [schedule(), SET, profile(), REFERENCE, token_schedule(), token_profile()],
    ids=lambda document: type(document).__name__,
)
def test_mutants_of_documents(document: Any, tmp_path: Path, fuzz: int) -> None:
    kind, data = type(document), document.to_bytes()
    tree, arrays = container.unpack("x", data)
    for seed in range(fuzz):
        path = tmp_path / "file.safetensors"
        path.write_bytes(mutants.bytes_of(data, seed))
        taken(kind.load, path)
        try:
            path.write_bytes(container.pack("x", mutants.tree_of(tree, seed), arrays))
        except (UnicodeError, ValueError):
            continue  # what cannot be written
        taken(kind.load, path)


def test_mutants_of_records(tmp_path: Path, fuzz: int) -> None:
    record = evaluation()
    record["samples"] = record["samples"][:2]
    text = json.dumps(record).encode()
    for seed in range(fuzz):
        (tmp_path / "record.json").write_bytes(mutants.bytes_of(text, seed))
        taken(read_record, tmp_path / "record.json")
        (tmp_path / "record.json").write_text(json.dumps(mutants.tree_of(record, seed)))
        if taken(again, tmp_path):
            table = (tmp_path / "table.md").read_text()
            assert all(character.isprintable() or character == "\n" for character in table)


DUE = Due(
    key="k", method="a", call=3, prompts=["x", "y"], seeds=[1, None],
    scores={"psnr": (0.0, 120.0), "latent": (0.0, math.inf)},
    optional=frozenset({"latent"}), scheduled=True, pictures=2,
)  # fmt: skip
PICTURES = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)


def part(folder: EvaluationFolder) -> dict[str, Any]:
    compute = {"transformer": {"model": {"compute": [1, 0, 1], "store": "int8"}}}
    return {
        "key": "k", "method": "a", "call": 3, "prompts": ["x", "y"], "seeds": [1, None], "flops": 10,
        "errors": [0.0, 0.5], "sizes": [1.0, 2.0], "cache_bytes": 5, "schedule": {"denoisers": compute},
        "seconds": {"loop": 1.0, "pipeline": 1.5},
        "peak_bytes": None, "scores": {"psnr": [30.0, 40.0], "latent": [0.1, 0.2]},
        "pictures": folder.keep_pictures("a-1", "0003", PICTURES),
    }  # fmt: skip


def test_mutants_of_parts(tmp_path: Path, fuzz: int) -> None:
    folder = EvaluationFolder(tmp_path)
    whole = part(folder)
    folder.keep("a-1", "0003", whole)
    assert folder.find("a-1", "0003", DUE) == whole
    path = tmp_path / "parts" / "a-1" / "0003.json"
    for seed in range(fuzz):
        for data in (
            mutants.bytes_of(json.dumps(whole).encode(), seed),
            json.dumps(mutants.tree_of(whole, seed)).encode(),
        ):
            path.write_bytes(data)
            if (found := folder.find("a-1", "0003", DUE)) is not None:
                assert found.keys() == whole.keys()
                assert all(0 <= v <= 120.01 and len(found["scores"]["psnr"]) == 2 for v in found["scores"]["psnr"])
                assert 0 <= found["seconds"]["loop"] <= found["seconds"]["pipeline"] * 1.01 < math.inf


def test_mutants_of_pictures_and_full_runs(tmp_path: Path, fuzz: int) -> None:
    folder = EvaluationFolder(tmp_path)
    folder.keep("a-1", "0003", part(folder))
    exact = Exact(PICTURES, PICTURES[..., 0])
    folder.keep_exact("0003", exact, "key")
    run, picture = tmp_path / "exact" / "0003.npz", tmp_path / "pictures" / "a-1" / "0003-00.png"
    data, drawn = run.read_bytes(), picture.read_bytes()
    for seed in range(fuzz):
        run.write_bytes(mutants.bytes_of(data, seed))
        if (found := folder.find_exact("0003", "key")) is not None:
            assert np.array_equal(found.output, exact.output)
        changed = mutants.bytes_of(drawn, seed)
        picture.write_bytes(changed)
        assert (folder.find("a-1", "0003", DUE) is None) == (changed != drawn)


def test_mutants_of_measured_calls(tmp_path: Path, fuzz: int) -> None:
    call = TINY["flux"].call(shared("flux")) | {"generator": torch.Generator().manual_seed(1)}
    measure(shared("flux"), [call], resume=tmp_path)
    (path,) = tmp_path.glob("call-*")
    data = path.read_bytes()
    tree, arrays = container.unpack("x", data)

    def take(data: bytes) -> None:
        demand_sound("x", PartialProfile.from_bytes(data, "x")[0], 0)

    take(data)
    for seed in range(fuzz):
        taken(take, mutants.bytes_of(data, seed))
        try:
            changed = container.pack("x", mutants.tree_of(tree, seed), arrays)
        except (UnicodeError, ValueError):
            continue
        taken(take, changed)


def test_mutants_of_routers(tmp_path: Path, fuzz: int) -> None:
    rows = {f"{n}.prob": torch.linspace(-3, 3, 4) for n in range(3)}
    for name, options in (("new", {}), ("old", {"_use_new_zipfile_serialization": False})):
        file = io.BytesIO()
        torch.save({"routers": rows, "args": None}, file, **options)
        (tmp_path / name).write_bytes(file.getvalue())
        assert router_file.read(tmp_path / name).steps == 3
        for seed in range(fuzz):
            (tmp_path / name).write_bytes(mutants.bytes_of(file.getvalue(), seed))
            taken(router_file.read, tmp_path / name)
    file = io.BytesIO()
    np.save(file, np.ones((3, 4), bool))
    for seed in range(fuzz):
        (tmp_path / "a.npy").write_bytes(mutants.bytes_of(file.getvalue(), seed))
        taken(plan, profile(), 6, file=str(tmp_path / "a.npy"))


def write_for_ever(path: Path) -> None:
    while True:
        for text in ("a" * 200_000, "b" * 200_000):
            files.write(path, text)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, fuzz: int) -> None:
    path = files.write(tmp_path / "file", "a" * 200_000)
    for n in range(max(4, fuzz // 8)):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        writer.start()
        time.sleep(0.005 + 0.003 * (n % 7))
        writer.kill()
        writer.join()
        assert path.read_text() in ("a" * 200_000, "b" * 200_000)
    assert files.write(path, "c").read_text() == "c"  # what a killed writer left hinders no other


def keep_often(folder: str, times: int) -> None:
    for _ in range(times):
        kept = EvaluationFolder(Path(folder))
        kept.keep("a-1", "0003", part(kept))
        kept.keep_exact("0003", Exact(PICTURES, None), "key")


def test_processes_that_write_the_same_files_all_succeed(tmp_path: Path, fuzz: int) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keep_often, args=(str(tmp_path), max(5, fuzz // 4))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    folder = EvaluationFolder(tmp_path)
    assert folder.find("a-1", "0003", DUE) is not None
    assert folder.find_exact("0003", "key") is not None
    assert not list(tmp_path.rglob("*.tmp"))
