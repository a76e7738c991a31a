"""Files are read whole and within a bound, and written whole or not at all, whoever prepared the folder."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffcache.documents import files
from diffcache.errors import DiffCacheError, DocumentError, NotWritten

pytestmark = pytest.mark.fast

READERS: list[Callable[..., object]] = [files.read_bytes, files.read_text, files.read_json, files.read_arrays]
EACH = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)


@EACH
def test_something_other_than_a_regular_file_is_refused_at_once(read: Callable[..., object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing", Path("/dev/zero"), Path("/dev/full"), Path("a\0b")):
        with pytest.raises(DocumentError, match="field 'file': ") as caught:
            read(path)
        assert caught.value.where == str(path)


@EACH
def test_the_size_is_bounded(read: Callable[..., object], tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(DocumentError, match=f"found {files.MAX_BYTES + 1} bytes. Allowed: at most"):
        read(tmp_path / "sparse")
    (tmp_path / "ten").write_bytes(b"0123456789")
    with pytest.raises(DocumentError, match="at most 9"):
        read(tmp_path / "ten", most=9)


@EACH
def test_no_link_is_followed_inside_a_folder(read: Callable[..., object], tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "file").write_text("{}")
    (folder / "link").symlink_to(outside / "file")
    (folder / "sub").symlink_to(outside)
    for path in (folder / "link", folder / "sub" / "file", folder / ".." / "outside" / "file"):
        with pytest.raises(DocumentError, match=r"link|leads out"):
            read(path, inside=folder)
    (tmp_path / "mine").symlink_to(outside)  # the user's own link to the folder itself
    assert files.read_json(tmp_path / "mine" / "file", inside=tmp_path / "mine") == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[1]", "found a JSON list"),
        (b"null", "found a JSON NoneType"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "the number NaN"),
        (b'{"a": 1, "a": 2}', "same key twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "of 5000 digits"),
        (b"\xff\xfe\x00", "not sound JSON"),
        (b"", "not sound JSON"),
    ],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_something_other_than_a_json_object_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(DocumentError, match=words):
        files.read_json(tmp_path / "file")


def test_damaged_arrays_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(100.0), b=np.array("text"))
    whole = path.read_bytes()
    assert list(files.read_arrays(path)) == ["a", "b"]
    flipped = whole[:150] + bytes([whole[150] ^ 255]) + whole[151:]
    for data in (b"", whole[:1], whole[:-1], whole[: len(whole) // 2], flipped, b"\x80\x04N.", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(DocumentError, match="damaged"):
            files.read_arrays(path)


def test_arrays_that_unpack_to_more_than_the_bound_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**22))
    with pytest.raises(DocumentError, match="found arrays of 4194304 bytes"):
        files.read_arrays(path, most=2**20)


def test_a_link_at_the_target_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    for name, link in (("soft", Path.symlink_to), ("hard", Path.hardlink_to)):
        outside.write_text("precious")
        link(folder / name, outside)
        files.write(folder / name, "new", inside=folder)
        assert outside.read_text() == "precious"
        assert (folder / name).read_text() == "new"
        assert not (folder / name).is_symlink()
        outside.unlink()
    assert {path.name for path in folder.iterdir()} == {"soft", "hard"}


def test_nothing_is_written_through_a_folder_that_is_a_link(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "parts").symlink_to(outside)
    for path in (folder / "parts" / "a.json", folder / "parts" / "deep" / "a.json"):
        with pytest.raises(DocumentError, match="is a link"):
            files.write(path, "new", inside=folder)
    assert list(outside.iterdir()) == []
    (tmp_path / "mine").symlink_to(folder)
    files.write(tmp_path / "mine" / "made" / "a.json", "new", inside=tmp_path / "mine")
    assert (folder / "made" / "a.json").read_text() == "new"


def test_no_device_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "out").symlink_to("/dev/null")
    for path in (tmp_path / "fifo", tmp_path / "out", Path("/dev/null")):
        with pytest.raises(DocumentError, match="found a device"):
            files.write(path, "new")
    with pytest.raises(DocumentError, match="found a folder"):
        files.write(tmp_path, "new")
    with pytest.raises(DocumentError, match="no folder"):
        files.write(tmp_path / "missing" / "a", "new")
    with pytest.raises(DocumentError, match="something else"):
        files.make_folder(tmp_path / "fifo")


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_where_the_system_refuses_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = files.write(tmp_path / "a", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(NotWritten, match=r"No space left on device\. Free space or choose another place") as caught:
        files.write(path, "new")
    assert isinstance(caught.value, DiffCacheError)
    assert caught.value.errno == 28
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_the_system_cannot_have_is_one_error(tmp_path: Path) -> None:
    for name in ("a" * 8000, "a\0b"):
        with pytest.raises(NotWritten):
            files.write(tmp_path / name, "new")
        with pytest.raises(NotWritten):
            files.make_folder(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert files.write(tmp_path / ("a" * 250), "new").is_file()


class StopHere(BaseException):
    pass


def test_a_writer_stopped_before_it_replaces_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write(tmp_path / "a", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(StopHere))
    with pytest.raises(StopHere):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_of_one_file_all_succeed(tmp_path: Path) -> None:
    texts = [str(n) * 10_000 for n in range(8)]
    failed: list[BaseException] = []

    def often(text: str) -> None:
        try:
            for _ in range(20):
                files.write(tmp_path / "deep" / "a", text, inside=tmp_path)
                assert files.read_text(tmp_path / "deep" / "a") in texts
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]
