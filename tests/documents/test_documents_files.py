"""Files that are no documents: one error each, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from documents import refused, schedule
from safetensors.numpy import save

from diffcache.documents import CacheSchedule, Profile
from diffcache.errors import DocumentError

pytestmark = pytest.mark.fast


def header(text: str | bytes, tensors: bytes = b"") -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data + tensors


def description(text: str) -> bytes:
    return header(json.dumps({"__metadata__": {"diffcache": text}}))


VALID = schedule().to_bytes()
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]
LORA = {"unet.lora_A.weight": np.zeros((4, 8), np.float32)}
OVERLAP = '{"__metadata__": {"diffcache": "{}"}, "a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}'
HUGE = '{"__metadata__": {"diffcache": "{}"}, "a": {"dtype": "F64", "shape": [99999999999], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        pytest.param(b"", "file", "found 0 bytes", id="empty"),
        pytest.param(b"\0\0\0", "file", "found 3 bytes", id="three bytes"),
        pytest.param(b"just some text, long enough", "file", "found a text. Allowed: a safetensors file", id="text"),
        pytest.param(b'{"steps": 50, "denoisers": {}}', "file", "found a JSON text", id="JSON"),
        pytest.param(pickle.dumps({"steps": 50}), "file", "found a pickle", id="pickle"),
        pytest.param(struct.pack("<Q", 2**63), "file", "found 8 bytes", id="length alone"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", "file", "header of 9223372036854775808", id="endless header"),
        pytest.param(
            header(" " * (2**22 + 1)), "file", "a header of 4194305 bytes. Allowed: at most 4194304", id="big"
        ),
        pytest.param(VALID[: HEADER_END - 9], "file", f"its header ends at {HEADER_END}", id="cut in the header"),
        pytest.param(VALID[:-1], "file", "damaged", id="cut in the tensors"),
        pytest.param(VALID + b"\0", "file", "damaged", id="longer than its tensors"),
        pytest.param(header("{}"), "metadata", "found none", id="no metadata"),
        pytest.param(save(LORA), "metadata", "a LoRA", id="a LoRA"),
        pytest.param(save(LORA, {"format": "pt"}), "metadata", "found the keys 'format'", id="weights saved by torch"),
        pytest.param(
            header('{"__metadata__": {"diffcache": "{}", "x": ""}}'),
            "metadata",
            "'diffcache', 'x'",
            id="a second metadata key",
        ),
        pytest.param(header('{"__metadata__": {"diffcache": 1}}'), "metadata", "Allowed: one key", id="a number there"),
        pytest.param(header('{"__metadata__": []}'), "metadata", "found none", id="a list there"),
        pytest.param(header('{"__metadata__"'), "header", "not sound JSON", id="header that is no JSON"),
        pytest.param(header(b'{"\xff\xfe": 1}'), "header", "not sound JSON", id="header that is no UTF-8"),
        pytest.param(header("[]"), "header", "found a JSON list", id="header that is a list"),
        pytest.param(header('{"a": 1, "a": 2}'), "header", "same key twice", id="a tensor twice"),
        pytest.param(header('{"a":' * 10**5), "header", "nested too deeply", id="header nested deeply"),
        pytest.param(header(OVERLAP, b"\0"), "file", "damaged", id="tensor outside the file"),
        pytest.param(header(HUGE, b"\0" * 8), "file", "damaged", id="tensor larger than the file"),
        pytest.param(description(""), "metadata", "not sound JSON", id="no description"),
        pytest.param(description("{"), "metadata", "not sound JSON", id="half a description"),
        pytest.param(description("7"), "metadata", "found a JSON int", id="a number for a description"),
        pytest.param(description("[" * 10**5), "metadata", "nested too deeply", id="description nested deeply"),
        pytest.param(description('{"steps": 1, "steps": 2}'), "metadata", "same key twice", id="a field twice"),
        pytest.param(description('{"steps": NaN}'), "metadata", "the number NaN", id="NaN in JSON"),
        pytest.param(
            description(f'{{"steps": {"9" * 5000}}}'), "metadata", "of 5000 digits", id="a number of 5000 digits"
        ),
    ],
)
def test_a_file_that_is_not_a_document_is_refused(tmp_path: Path, data: bytes, field: str, words: str) -> None:
    path = tmp_path / "schedule.safetensors"
    path.write_bytes(data)
    refused(CacheSchedule, path, field, words)
    refused(Profile, path, field, words)


def test_a_zip_archive_is_distinguished_from_a_document(tmp_path: Path) -> None:
    path = tmp_path / "schedule.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    refused(CacheSchedule, path, "file", "found a zip archive, as torch.save writes", "Nothing in it was run.")


def test_a_place_where_no_file_is(tmp_path: Path) -> None:
    refused(CacheSchedule, tmp_path, "file", "found a folder", "Allowed: a regular file")
    refused(CacheSchedule, tmp_path / "missing", "file", "no such file", "Check the path")
    refused(CacheSchedule, Path("/dev/zero"), "file", "device" if Path("/dev/zero").exists() else "no such file")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.safetensors"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    refused(CacheSchedule, path, "file", "found 268435457 bytes. Allowed: at most 268435456")


class Trap:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_file_is_run(tmp_path: Path, protocol: int) -> None:
    path, victim = tmp_path / "schedule.safetensors", tmp_path / "victim"
    trap = pickle.dumps(Trap(victim), protocol)
    for data in (
        trap,
        header("{}", trap),
        save({"a": np.frombuffer(trap, np.uint8)}),
        description(trap.decode("latin-1")),
    ):
        path.write_bytes(data)
        with pytest.raises(DocumentError):
            CacheSchedule.load(path)
    assert not victim.exists()
    pickle.loads(trap)
    assert victim.exists()  # the trap does work
