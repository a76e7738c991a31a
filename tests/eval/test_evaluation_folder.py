"""The folder of an evaluation may be damaged, forged or prepared by others: it is mended or refused, never believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import evaluation
from pipelines import TINY, shared

from diffcache import evaluate
from diffcache.errors import DiffCacheError, DocumentError
from diffcache.eval import Evaluation, runner
from diffcache.eval.evaluation import again
from diffcache.eval.plausible import Due
from diffcache.eval.saved_parts import EvaluationFolder, slug

FULL = slug("full run")


def made(out: Path) -> Evaluation:
    pipe = shared("flux")
    call = TINY["flux"].call(pipe, batch=2) | {"generator": torch.Generator().manual_seed(3), "output_type": "np"}
    metrics = ("psnr", "latent")
    return evaluate(pipe, {"a": "uniform:every=2"}, [call], metrics=metrics, compare=(), out=out, progress=False)


def scores(found: Evaluation) -> dict[str, Any]:
    return {m["name"]: {n: s["values"] for n, s in m["scores"].items()} for m in found.record["methods"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return made(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def due(whole: Evaluation) -> Due:
    """What the part of the method "a" must say."""
    asked: list[Due] = []
    inner = EvaluationFolder.find

    def find(self: EvaluationFolder, method: str, call: str, due: Due) -> Any:
        asked.append(due)
        return inner(self, method, call, due)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationFolder, "find", find)
        made(whole.folder)
    return asked[1]


@pytest.fixture
def folder(whole: Evaluation, tmp_path: Path) -> Path:
    """A copy of a folder in which everything is done."""
    for path in whole.folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / "out" / path.relative_to(whole.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "out"


def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gains an entry with every run of the pipeline."""
    seen: list[str] = []
    inner = runner.watched

    def watched(*args: Any, **options: Any) -> Any:
        seen.append("run")
        return inner(*args, **options)

    monkeypatch.setattr(runner, "watched", watched)
    return seen


def part(folder: Path, method: str = "a") -> Path:
    return folder / "parts" / slug(method) / "0000.json"


def demand_mended(folder: Path, whole: Evaluation, seen: list[str], file: Path) -> None:
    """The file was not believed but made again, and everything is as it was."""
    before = file.read_bytes() if file.is_file() and not file.is_symlink() else None
    found = made(folder)
    assert seen, "it was believed"
    assert scores(found) == scores(whole)
    assert file.is_file()
    assert not file.is_symlink()
    assert file.read_bytes() != before
    seen.clear()
    made(folder)
    assert not seen


def test_what_is_whole_is_believed(folder: Path, whole: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = runs(monkeypatch)
    assert scores(made(folder)) == scores(whole)
    assert not seen


def test_a_damaged_part_is_made_again(
    folder: Path, whole: Evaluation, due: Due, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in (b"", b"{", b"[1]", b"null", b"{}", b"[" * 200_000, b'{"key": ' * 200_000, b"\xff\xfe", b"7" * 5000):
        part(folder).write_bytes(data)
        assert EvaluationFolder(folder).find(slug("a"), "0000", due) is None
    demand_mended(folder, whole, runs(monkeypatch), part(folder))


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "fifty scores": lambda p: p["scores"].update(psnr=[40.0] * 50),
    "PSNR of 999": lambda p: p["scores"].update(psnr=[999.0, 999.0]),
    "negative PSNR": lambda p: p["scores"].update(psnr=[-3.0, 30.0]),
    "negative error": lambda p: p["scores"].update(latent=[-0.1, 0.1]),
    "an infinite score": lambda p: p["scores"].update(latent=[1e999, 0.1]),
    "a score as text": lambda p: p["scores"].update(latent=["0.1", 0.1]),
    "true for a score": lambda p: p["scores"].update(latent=[True, 0.1]),
    "no PSNR": lambda p: p["scores"].pop("psnr"),
    "another metric": lambda p: p["scores"].update(ssim=[1.0, 1.0]),
    "negative seconds": lambda p: p["seconds"].update(loop=-1.0),
    "a loop longer than the call": lambda p: p["seconds"].update(loop=1e9),
    "seconds that are none": lambda p: p.update(seconds=None),
    "another call": lambda p: p.update(call=7),
    "the call as a fraction": lambda p: p.update(call=0.0),
    "another method": lambda p: p.update(method="full run"),
    "another prompt": lambda p: p.update(prompts=["x", "y"]),
    "a prompt more": lambda p: p["prompts"].append(""),
    "another seed": lambda p: p.update(seeds=[4, 4]),
    "no work": lambda p: p.update(flops=-1),
    "an error less": lambda p: p["errors"].pop(),
    "a negative error of a state": lambda p: p["errors"].__setitem__(0, -1.0),
    "a size that is none": lambda p: p["sizes"].__setitem__(0, None),
    "negative bytes": lambda p: p.update(cache_bytes=-5),
    "bytes as text": lambda p: p.update(peak_bytes="9"),
    "a schedule of halves": lambda p: p["schedule"]["denoisers"]["transformer"]["model"].update(compute=[0.5] * 4),
    "a schedule that is none": lambda p: p.update(schedule=[1]),
    "a foreign picture": lambda p: p.update(pictures={"../x.png": "0" * 64, "y.png": "0" * 64}),
    "no pictures": lambda p: p.update(pictures={}),
    "a field more": lambda p: p.update(note="x"),
    "a field less": lambda p: p.pop("flops"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_part_is_not_believed(folder: Path, due: Due, forgery: str) -> None:
    forged = json.loads(part(folder).read_text())
    assert EvaluationFolder(folder).find(slug("a"), "0000", due) == forged
    FORGERIES[forgery](forged)
    part(folder).write_text(json.dumps(forged))
    assert EvaluationFolder(folder).find(slug("a"), "0000", due) is None


def test_forged_parts_are_made_again(folder: Path, whole: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("full run", "a"):
        forged = json.loads(part(folder, method).read_text())
        forged["scores"]["psnr"] = [999.0] * 50
        part(folder, method).write_text(json.dumps(forged))
    demand_mended(folder, whole, runs(monkeypatch), part(folder))


def test_a_picture_that_is_not_that_of_the_run_is_made_again(
    folder: Path, whole: Evaluation, due: Due, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (folder / "pictures" / method / "0000-00.png" for method in (slug("a"), FULL))
    for data in (a.read_bytes()[:-1], b"", b.read_bytes()):
        a.write_bytes(data)
        assert EvaluationFolder(folder).find(slug("a"), "0000", due) is None
    demand_mended(folder, whole, runs(monkeypatch), a)


def exact_of_another(path: Path) -> bytes:
    with np.load(path) as found:
        arrays = dict(found)
    np.savez(path, **arrays | {"output": arrays["output"] * np.nan})
    return path.read_bytes()


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "a byte short": lambda path: path.read_bytes()[:-1],
    "cut": lambda path: path.read_bytes()[:100],
    "changed": lambda path: path.read_bytes()[:400] + b"\0\1\2\3" + path.read_bytes()[404:],
    "nothing but a head": lambda path: b"PK\x03\x04" + bytes(99),
    "NaN": exact_of_another,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_full_run_is_not_believed(folder: Path, damage: str) -> None:
    path = folder / "exact" / "0000.npz"
    with np.load(path) as found:
        key = str(found["key"])
    assert EvaluationFolder(folder).find_exact("0000", key) is not None
    assert EvaluationFolder(folder).find_exact("0000", "another") is None
    path.write_bytes(DAMAGES[damage](path))
    assert EvaluationFolder(folder).find_exact("0000", key) is None


def test_a_damaged_full_run_is_made_again(folder: Path, whole: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "exact" / "0000.npz"
    path.write_bytes(path.read_bytes()[:-1])
    demand_mended(folder, whole, runs(monkeypatch), path)


FILES = (
    "record.json", "table.md", "report.html", "exact/0000.npz",
    f"parts/{FULL}/0000.json", f"parts/{slug('a')}/0000.json", f"pictures/{FULL}/0000-00.png",
)  # fmt: skip


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["soft", "hard"])
def test_no_file_outside_is_changed_through_a_link(
    tmp_path: Path, whole: Evaluation, link: Callable[[Path, Path], None]
) -> None:
    for n, name in enumerate(FILES):
        (tmp_path / f"{n}").write_text("precious")
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        link(tmp_path / "out" / name, tmp_path / f"{n}")
    (tmp_path / "mine").symlink_to(tmp_path / "out")  # the user's own link
    assert scores(made(tmp_path / "mine")) == scores(whole)
    assert {(tmp_path / f"{n}").read_text() for n in range(len(FILES))} == {"precious"}
    assert all((tmp_path / "out" / name).is_file() and not (tmp_path / "out" / name).is_symlink() for name in FILES)
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["parts", "exact", "pictures", "trials", f"parts/{FULL}", f"pictures/{slug('a')}"])
def test_a_folder_that_is_a_link_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = runs(monkeypatch)
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DocumentError, match=r"is a link.*Remove it"):
        made(tmp_path / "out")
    assert not seen
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_path_that_is_not_a_file_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None]
) -> None:
    seen = runs(monkeypatch)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(DocumentError, match="found a"):
        made(tmp_path)
    assert not seen


def test_a_place_where_no_folder_can_be_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = runs(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffCacheError):
        made(tmp_path / "file")
    assert not seen


# ------------------------------------------------------------ records and what is written of them


def foreign(record: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder


BARE = {"format": "diffcache.evaluation", "version": 1}
OURS = {"name": "a", "kind": "ours"}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("[" * 200_000, "file"),
        ("[1]", "file"),
        ('{"format": "diffcache.evaluation", "version": 1, "title": ' + "[" * 300 + "]" * 300 + "}", "file"),
        ({"format": ["x"]}, "format"),
        (BARE | {"version": True}, "version"),
        (BARE | {"methods": 7}, "methods"),
        (BARE | {"methods": [None]}, "methods/0"),
        (BARE | {"methods": [{"kind": "ours"}]}, "methods/0/name"),
        (BARE | {"methods": [{"name": ["a"], "kind": "ours"}]}, "methods/0/name"),
        (BARE | {"methods": [OURS | {"scores": {"psnr": {"mean": "x"}}}]}, "methods/0/scores/psnr/mean"),
        (BARE | {"methods": [OURS | {"computed_steps": 1e999}]}, "file"),
        (json.dumps(BARE | {"methods": [OURS | {"steps": 0}]}).replace("0}", "1e999}"), "methods/0/steps"),
        (BARE | {"methods": [OURS | {"pictures": {"0": 3}}]}, "methods/0/pictures/0"),
        (BARE | {"metrics": {"psnr": None}}, "metrics/psnr"),
        (BARE | {"samples": [{"prompt": "x"}]}, "samples/0/id"),
        (BARE | {"title": 3}, "title"),
    ],
)  # fmt: skip
def test_a_foreign_record_is_one_error(tmp_path: Path, record: Any, field: str) -> None:
    with pytest.raises(DocumentError) as caught:
        again(foreign(record, tmp_path))
    assert caught.value.field == field
    assert caught.value.where == str(tmp_path / "record.json")


def test_a_record_is_read_from_a_file_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(DocumentError, match="found a folder or a device"):
        again(tmp_path)


def test_a_record_that_says_little_is_enough(tmp_path: Path) -> None:
    found = again(foreign(BARE, tmp_path))
    assert found.report.is_file()
    assert "| a |" in str(again(foreign(BARE | {"methods": [OURS]}, tmp_path)))


HOSTILE = "\x1b[2J\x1b[31m[x](http://e.org) ![y](http://e.org/p.png)\n| forged | row |\r\u202e<b>\ud800 www.e.org"


def test_foreign_text_shows_as_text_in_table_and_report(tmp_path: Path) -> None:
    record = evaluation() | {"title": HOSTILE, "warning": HOSTILE}
    record["metrics"]["psnr"] |= {"title": HOSTILE, "unit": HOSTILE}
    record["methods"][1] |= {"name": HOSTILE, "detail": HOSTILE, "note": HOSTILE}
    record["methods"][1]["scores"]["psnr"]["verdicts"] = [{"verdict": HOSTILE, "against": HOSTILE}]
    record["samples"][0]["prompt"] = HOSTILE
    found = again(foreign(record, tmp_path))
    for text in (str(found), (tmp_path / "table.md").read_text(), found.report.read_text()):
        assert all(character.isprintable() or character == "\n" for character in text)
    table = str(found).replace("\\[", "").replace("\\]", "").replace("\\://", "").replace("www\\.", "")
    assert not {"[x](", "![", "<b>", "://", "www."} & {
        word for word in ("[x](", "![", "<b>", "://", "www.") if word in table
    }
    assert len(str(found).splitlines()) == len(
        str(again(foreign(evaluation() | {"warning": "x"}, tmp_path))).splitlines()
    )
    assert json.loads((tmp_path / "record.json").read_text())["title"] == "Caching on a small text-to-image model"


def test_a_title_that_nothing_can_print_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = runs(monkeypatch)
    pipe = shared("flux")
    call = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(3)}
    for options in ({"title": "a\ud800"}, {"schedules": {"a\ud800": "uniform:every=2"}}):
        with pytest.raises(DiffCacheError, match="Unicode"):
            evaluate(
                pipe, **{"schedules": {"a": "full"}, "calls": [call], "out": tmp_path, "progress": False} | options
            )
    assert not seen
    assert not list(tmp_path.iterdir())
