"""``diffcache optimize`` writes the schedule that ``diffcache.optimize`` finds, and says what to do with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command_of, status_of
from pipelines import fresh, shared

import diffcache
from diffcache.cli import _samples
from diffcache.cli._calls import samples_in
from diffcache.documents import Budget, CacheSchedule
from diffcache.errors import BadOption

LABELS = (1, 3, 2, 0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys, "optimize")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my dit"
    fresh("dit").save_pretrained(folder)
    return folder


@pytest.fixture
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my dit").symlink_to(saved)
    Path("labels.csv").write_text("\n".join(["class_labels", *map(str, LABELS)]))
    return tmp_path


def calls(**more: Any) -> list[dict[str, Any]]:
    """The calls that the command makes of labels.csv with --batch 2."""
    return [
        {
            "class_labels": list(LABELS[first : first + 2]),
            "num_inference_steps": 6,
            "guidance_scale": 4.0,
            "generator": [torch.Generator().manual_seed(seed) for seed in (first, first + 1)],
        }
        | more
        for first in (0, 2)
    ]


def plain(schedule: CacheSchedule) -> CacheSchedule:
    """The schedule without the notes of how it was made."""
    return dataclasses.replace(schedule, provenance={})


WORDS = ("my dit", "--prompts", "labels.csv", "--steps", 6, "--batch", 2, "--device", "cpu", "--guidance", 4)


def test_it_writes_what_the_library_finds_and_says_what_comes_next(command: Command, here: Path) -> None:
    code, out, complaint = command(*WORDS, "--computed", 3, "--time-limit", 0, "--out", "x.safetensors")
    assert code == 0
    found = CacheSchedule.load("x.safetensors")
    assert plain(found) == plain(diffcache.optimize(shared("dit"), calls(), 3, time_limit_s=0))
    assert found.computed_steps == 3
    assert found.provenance["model"] == "my dit"
    assert found.provenance["prompts"] == "labels.csv"
    assert out.startswith(f"{found.describe()}\nwritten to x.safetensors\n")
    assert "pipe = diffcache.accelerate(pipe, 'x.safetensors')" in out
    assert "  diffcache show x.safetensors\n" in out
    assert "  diffcache eval run 'my dit' x.safetensors --prompts other-prompts.csv --steps 6 --guidance 4\n" in out
    assert "note: 4 samples. With 16 or more" in complaint


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (("--speedup", 2), Budget(speedup=2)),
        (("--min-psnr-db", 20), Budget(max_error_db=20)),
        (("--computed", 3, "--memory", "1MB"), Budget(computed_steps=3, memory_bytes=1_000_000)),
    ],
    ids=lambda value: str(value),
)
def test_every_goal_reaches_the_library(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], budget: Budget
) -> None:
    asked: list[tuple[Any, Any, Any, Any]] = []

    def optimize(pipe: Any, calls: Any, budget: Budget, **options: Any) -> CacheSchedule:
        asked.append((type(pipe).__name__, calls, budget, options))
        raise BadOption("budget", "seen", "this test")

    monkeypatch.setattr("diffcache.profiling.calibration.optimizing.optimize", optimize)
    more = ("--scheduler", "uniform", "--store", "bf16", "--call", "output_type=latent", "--time-limit", 2.5)
    code, _, _ = command(*WORDS, *words, *more)
    ((kind, found, goal, options),) = asked
    assert (code, kind, goal) == (2, "DiTPipeline", budget)
    wanted = {"scheduler": "uniform", "time_limit_s": 2.5, "sites": "model", "store": "bf16", "progress": True}
    assert options == wanted
    assert [call["class_labels"] for call in found] == [[1, 3], [2, 0]]
    assert {call["output_type"] for call in found} == {"latent"}


REFUSED: list[tuple[tuple[object, ...], str]] = [
    ((), "no goal was given. Pass exactly one of --computed, --speedup, --min-psnr-db."),
    (("--computed", 3, "--speedup", 2), "--computed and --speedup were given"),
    (("--computed", 0), "computed_steps=0 was given"),
    (("--computed", 7), "computed_steps=7 was given. Allowed: whole numbers from 1 to 6, the steps of the loop."),
    (("--computed", 2.5), "computed_steps=2.5 was given. Allowed: whole numbers from 1 to 6"),
    (("--speedup", 7), "speedup=7.0 was given. Allowed: up to 6"),
    (("--computed", 3, "--memory", "much"), "memory='much' was given"),
    (("--computed", 3, "--time-limit", -1), "time_limit=-1.0 was given"),
    (("--computed", 3, "--time-limit", 1, "--sites", "block"), "--sites block needs no search"),
    (("--computed", 3, "--sites", "layers"), "sites='layers' was given"),
    (("--computed", 3, "--scheduler", "unifrom"), "Did you mean 'uniform'?"),
    (("--computed", 3, "--store", "int7"), "store='int7' was given"),
    (("--computed", 3, "--out", "none/x.safetensors"), "a file in a folder that exists"),
    (("--computed", 3, "--call", "eta"), "call='eta' was given. Allowed: NAME=VALUE"),
    (("--computed", 3, "--call", "guidance_scale=3"), "guidance_scale is given twice"),
    (("--computed", 3, "--call", "colour=3"), "no argument of DiTPipeline called 'colour'"),
    (("--computed", 3, "--seeds", "x"), "seeds='x' was given"),
    (("--computed", 3, "--dtype", "int8"), "dtype='int8' was given"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_before_the_model_is_loaded(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], says: str
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)  # a call of it is another error
    before = sorted(here.iterdir())
    code, out, complaint = command(*WORDS, *words)
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert says in complaint
    assert (code, out) == (status_of(complaint), "")
    assert sorted(here.iterdir()) == before


def test_the_steps_of_a_demo_model_are_known_before_it_is_loaded(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffcache.assets.load", None)
    assert "1 to 8, the steps of the loop" in command("demo:flux", "--steps", 8, "--computed", 9)[2]


def test_options_of_calls_are_parsed_as_fields_of_a_table() -> None:
    found = _samples.options(
        ["true_cfg_scale=4", "negative_prompt=2 cats", "flag=true", "size=[1, 2]"],
        steps=6,
        guidance=None,
        height=None,
        width=64,
    )
    assert {name: value for name, value in found.items() if value is not None} == {
        "num_inference_steps": 6,
        "width": 64,
        "true_cfg_scale": 4,
        "negative_prompt": "2 cats",
        "flag": True,
        "size": [1, 2],
    }
    for wrong in ("=3", "a b=3", "prompt", "1=2"):
        with pytest.raises(BadOption, match="NAME=VALUE"):
            _samples.options([wrong], steps=1, guidance=None, height=None, width=None)


def test_samples_of_a_call_are_counted() -> None:
    generator = torch.Generator()
    assert samples_in({"prompt": "a", "generator": generator}) == 1
    assert samples_in({"prompt": ["a", "b"], "generator": [generator] * 2, "sigmas": [1.0, 0.5, 0.1]}) == 2
    assert samples_in({"prompt_embeds": torch.zeros(3, 4)}) == 3
