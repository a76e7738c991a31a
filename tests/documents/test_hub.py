"""Documents from folders and from the Hub. The Hub's own client runs against a small server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documents import profile, schedule

from diffcache.documents import CacheSchedule, Profile
from diffcache.errors import DiffCacheError, DocumentError, HubUnavailable

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


def test_a_local_folder_works(tmp_path: Path) -> None:
    schedule().save(tmp_path / "schedule.safetensors")
    profile().save(tmp_path / "profile.safetensors")
    schedule(provenance={}).save(tmp_path / "other.safetensors")
    assert CacheSchedule.from_pretrained(tmp_path) == schedule()
    assert CacheSchedule.from_pretrained(str(tmp_path), filename="other.safetensors") == schedule(provenance={})
    assert Profile.from_pretrained(tmp_path) == profile()


def test_a_local_folder_without_the_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"schedule.safetensors: field 'file': no such file"):
        CacheSchedule.from_pretrained(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: one repository, with a schedule and with something else."""

    files: dict[str, bytes] = {}  # noqa: RUF012  shared with the test on purpose

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        content = self.files.get(name, b"") if repo == "house/steps" and revision in {"main", "v1"} else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("ETag", f'"{name}-{len(content)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if repo == "house/steps" else "RepoNotFound")
        self.end_headers()
        return content

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Hub.files = {"schedule.safetensors": schedule().to_bytes(), "readme.md": b"# some words, not a document"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


CLIENT = """
import json, sys, types
package = types.ModuleType("diffcache")  # the documents alone, without what the package imports for others
package.__path__ = ["diffcache"]
sys.modules["diffcache"] = package
from diffcache.documents.schedule import CacheSchedule
answers = []
for repo, options in json.loads(sys.argv[1]):
    try:
        answers.append(["read", CacheSchedule.from_pretrained(repo, **options).digest()])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def asked(endpoint: str, cache: Path, *questions: tuple[str, dict[str, str]], offline: bool = False) -> list[list[str]]:
    """What ``from_pretrained`` answers in a process that knows this Hub and no other."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    run = [sys.executable, "-c", CLIENT, json.dumps(questions)]
    return json.loads(subprocess.check_output(run, cwd=ROOT, env=environment, text=True))  # type: ignore[no-any-return]


def test_the_hub_delivers_or_one_error_says_what_to_do(server: str, tmp_path: Path) -> None:
    found, pinned, no_file, no_repo, no_document, no_name = asked(
        server,
        tmp_path,
        ("house/steps", {}),
        ("house/steps", {"revision": "v1"}),
        ("house/steps", {"filename": "missing.safetensors"}),
        ("house/nothing", {}),
        ("house/steps", {"filename": "readme.md"}),
        ("./no/such/folder", {}),
    )
    assert found == pinned == ["read", schedule().digest()]
    for (kind, message), words in [
        (
            no_file,
            ["missing.safetensors of house/steps: ", "Entry Not Found", "there is no local folder 'house/steps'"],
        ),
        (no_repo, ["schedule.safetensors of house/nothing: ", "Repository"]),
        (no_name, ["schedule.safetensors of ./no/such/folder: ", "HFValidationError"]),
    ]:
        assert kind == "HubUnavailable"
        for word in [*words, "by other means, then load(path)"]:
            assert word.lower() in message.lower()
        assert "\n" not in message
    assert no_document[0] == "DocumentError"


def test_a_hub_that_cannot_be_reached_is_one_error_that_says_what_to_do(server: str, tmp_path: Path) -> None:
    ((kind, message),) = asked(server, tmp_path, ("house/steps", {}), offline=True)
    assert kind == "HubUnavailable"
    assert message.startswith("schedule.safetensors of house/steps: ")
    assert "offline" in message.lower()
    assert "Download schedule.safetensors by other means, then load(path)" in message


class Recorder:
    """Stands where the Hub's client does, and writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails: Exception | None = None

    def __call__(self, **options: Any) -> Recorder:
        self.calls.append(("HfApi", options))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.fails:
            raise self.fails
        self.calls.append(("create_repo", {"repo_id": repo_id} | options))

    def upload_file(self, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload_file", options))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    stand_in = Recorder()
    monkeypatch.setattr("huggingface_hub.HfApi", stand_in)
    return stand_in


def test_push_uploads_the_bytes_that_save_writes(recorder: Recorder, tmp_path: Path) -> None:
    assert schedule().push_to_hub("house/steps") == "https://hub/commit/1"
    (_, client), (_, created), (_, uploaded) = recorder.calls
    assert client == {"token": None}
    assert created == {"repo_id": "house/steps", "private": False, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["path_in_repo"]) == ("house/steps", "schedule.safetensors")
    assert uploaded["commit_message"] == "Add schedule.safetensors (diffcache.schedule)"
    assert uploaded["path_or_fileobj"] == schedule().save(tmp_path / "file").read_bytes()


def test_push_passes_its_arguments_on(recorder: Recorder) -> None:
    profile().push_to_hub("house/steps", filename="a/b.safetensors", private=True, token="secret", commit_message="why")
    (_, client), (_, created), (_, uploaded) = recorder.calls
    assert client == {"token": "secret"}
    assert created["private"] is True
    assert (uploaded["path_in_repo"], uploaded["commit_message"]) == ("a/b.safetensors", "why")
    assert Profile.from_bytes(uploaded["path_or_fileobj"]) == profile()


def test_a_push_that_fails_says_how_to_keep_the_file(recorder: Recorder) -> None:
    recorder.fails = ConnectionError("no route to host\nand more")
    with pytest.raises(HubUnavailable) as caught:
        schedule().push_to_hub("house/steps", token="secret")
    assert str(caught.value) == (
        "schedule.safetensors of house/steps: ConnectionError: no route to host and more. "
        "Write it with save(path) and upload that file later."
    )
    assert isinstance(caught.value, DiffCacheError)
    assert (caught.value.repo, caught.value.filename) == ("house/steps", "schedule.safetensors")
    assert caught.value.__cause__ is recorder.fails


def test_a_missing_client_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: schedule().push_to_hub("house/steps"), lambda: CacheSchedule.from_pretrained("house/steps")):
        with pytest.raises(HubUnavailable, match=r"schedule.safetensors of house/steps: .*huggingface_hub"):
            use()
