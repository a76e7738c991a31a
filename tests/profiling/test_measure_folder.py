"""The folder of a measurement may be damaged, forged or prepared by others: it is refused with one error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import TINY, shared

from diffcache import measure
from diffcache.documents import container
from diffcache.errors import DocumentError
from diffcache.profiling.measuring.resume import ABOUT

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]


def calls() -> list[dict[str, Any]]:
    pipe = shared("flux")
    return [TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(n)} for n in range(2)]


def again(folder: Path) -> None:
    measure(shared("flux"), calls(), resume=folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a measurement of two calls: those of call 0, of call 1, and what they belong to."""
    folder = tmp_path_factory.mktemp("measured")
    measure(shared("flux"), calls()[:1], resume=folder)
    (first,) = folder.glob("call-*")
    again(folder)
    (second,) = set(folder.glob("call-*")) - {first}
    return {name: (folder / name).read_bytes() for name in (first.name, second.name, ABOUT)}


def laid(files: dict[str, bytes], folder: Path) -> tuple[Path, Path]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    first, second, _ = files
    return folder / first, folder / second


def forge(file: Path, edit: Callable[[Tree, Arrays], object]) -> None:
    tree, arrays = container.unpack("x", file.read_bytes())
    arrays = {name: array.copy() for name, array in arrays.items()}
    edit(tree, arrays)
    file.write_bytes(container.pack("x", tree, arrays))


def test_what_is_whole_is_taken(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid(files, tmp_path)
    monkeypatch.setattr(type(shared("flux")), "__call__", lambda *_, **__: pytest.fail("it was measured again"))
    again(tmp_path)


OF_ANY: dict[str, Callable[[Tree, Arrays], object]] = {
    "no calls": lambda tree, _: tree.update(calls={}),
    "another call": lambda tree, _: tree.update(calls={"7": next(iter(tree["calls"].values()))}),
    "a call that is no number": lambda tree, _: tree.update(calls={"x": next(iter(tree["calls"].values()))}),
    "calls as a list": lambda tree, _: tree.update(calls=[]),
    "no sites": lambda tree, _: tree.pop("sites"),
    "sites without the model": lambda tree, _: tree.update(sites={}),
    "negative samples": lambda tree, _: tree["sites"].update(model=[-1]),
    "samples as text": lambda tree, _: tree["sites"].update(model=["1"]),
    "a site that is none": lambda tree, _: tree["sites"].update({"nowhere:x": [1]}),
    "no circumstances": lambda tree, _: next(iter(tree["calls"].values())).pop("grid"),
    "a grid of text": lambda tree, _: next(iter(tree["calls"].values())).update(grid=["a", "b"]),
    "a loop that never begins": lambda tree, _: next(iter(tree["calls"].values())).update(grid=[6, 6]),
    "other samples": lambda tree, _: next(iter(tree["calls"].values())).update(samples=50),
    "no Gram table": lambda tree, arrays: [arrays.pop(name) for name in [*arrays] if name.endswith("grams")],
    "NaN": lambda tree, arrays: arrays["sites/model/0/output/l1"].__setitem__((0, 1), np.nan),
    "a negative distance": lambda tree, arrays: arrays["sites/model/0/output/l1"].__imul__(-1),
    "a negative change": lambda tree, arrays: arrays["sites/model/0/input_change"].__isub__(9),
    "another number of steps": lambda tree, arrays: arrays.update({"sites/model/0/output/l1": np.zeros((2, 2))}),
    "no random state": lambda tree, arrays: arrays.pop("more/cpu"),
    "half a random state": lambda tree, arrays: arrays.update({"more/cpu": arrays["more/cpu"][:9]}),
    "a random state of NaN": lambda tree, arrays: arrays["more/0"].__imul__(np.nan),
}
OF_THE_FIRST: dict[str, Callable[[Tree, Arrays], object]] = {
    "no first call": lambda tree, _: tree.update(first=None),
    "a first call that is none": lambda tree, _: tree.update(first=[1]),
    "a first call without costs": lambda tree, _: tree["first"].pop("costs"),
    "negative seconds": lambda tree, _: tree["first"]["costs"]["model"].update(seconds=-1.0),
    "a cost as text": lambda tree, _: tree["first"]["costs"]["model"].update(flops="many"),
    "no denoiser": lambda tree, _: tree["first"].update(denoiser=[]),
    "no timesteps": lambda tree, arrays: arrays.pop("first/timesteps"),
}


@pytest.mark.parametrize(
    ("which", "forgery"), [*((n, name) for n in (0, 1) for name in OF_ANY), *((0, name) for name in OF_THE_FIRST)]
)
def test_a_forged_call_is_one_error(files: dict[str, bytes], tmp_path: Path, which: int, forgery: str) -> None:
    file = laid(files, tmp_path)[which]
    forge(file, (OF_ANY | OF_THE_FIRST)[forgery])
    with pytest.raises(DocumentError, match="Remove the file to measure this call again") as caught:
        again(tmp_path)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("data", [b"", b"[1]", b"null", b"[" * 200_000, b"\xff"], ids=lambda data: repr(data[:5]))
def test_what_a_folder_belongs_to_is_one_error(files: dict[str, bytes], tmp_path: Path, data: bytes) -> None:
    laid(files, tmp_path)
    (tmp_path / ABOUT).write_bytes(data)
    with pytest.raises(DocumentError, match=r"cannot be read.*Remove the folder to begin anew") as caught:
        again(tmp_path)
    assert caught.value.where == str(tmp_path / ABOUT)


def test_links_and_devices_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "outside").write_bytes(b"precious")
    for file in (*laid(files, tmp_path / "in")[:1], tmp_path / "in" / ABOUT):
        data = file.read_bytes()
        for lay in (lambda path: path.symlink_to(tmp_path / "outside"), os.mkfifo):
            file.unlink()
            lay(file)
            with pytest.raises(DocumentError, match=r"is a link|a folder or a device"):
                again(tmp_path / "in")
        file.unlink()
        file.write_bytes(data)
    assert (tmp_path / "outside").read_bytes() == b"precious"
