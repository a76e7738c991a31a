"""``diffcache profile``: files become calls, calls become the profile that ``measure`` makes, errors are one line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command_of, status_of
from pipelines import TINY, fresh, shared

import diffcache
from diffcache import assets, cli
from diffcache.cli import _samples
from diffcache.cli._calls import calls_of, seeds_of
from diffcache.cli._models import Loaded
from diffcache.documents import Profile
from diffcache.errors import BadOption, UnknownName


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys, "profile")


def refused(command: Command, *words: object) -> str:
    """The error's line; bars of what ran before it apart."""
    code, out, complaint = command(*words)
    assert out == ""
    *_, line = complaint.strip().split("\n")
    assert code == status_of(line)
    assert line.startswith("error: ")
    assert "Traceback" not in complaint
    return line.removeprefix("error: ")


def timeless(profile: Profile) -> Profile:
    denoisers = {
        name: dataclasses.replace(d, sites={s: dataclasses.replace(one, seconds=0.0) for s, one in d.sites.items()})
        for name, d in profile.denoisers.items()
    }
    return dataclasses.replace(profile, denoisers=denoisers, seconds=0.0, provenance={})


# ----------------------------------------------------------------------- files


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat, black\n\n  1984 \n", encoding="utf-8")
    assert _samples.read(tmp_path / "p.txt") == [{"prompt": "a cat, black"}, {"prompt": "1984"}]


def test_a_column_is_an_argument(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "prompt,negative_prompt,guidance_scale,width,seed,flag,mu,name,num_images_per_prompt,prompt_embeds\n"
        '"a cat, black",,7.5,512,3,TRUE,"[1, 2]",plain,1,[[0.5]]\n'
        "\n"
        "1984,2,,,,false,null,x,,\n"
    )
    assert _samples.read(tmp_path / "p.csv") == [
        {"prompt": "a cat, black", "guidance_scale": 7.5, "width": 512, "seed": 3, "flag": True, "mu": [1, 2],
         "name": "plain", "num_images_per_prompt": 1, "prompt_embeds": [[0.5]]},
        {"prompt": "1984", "negative_prompt": "2", "flag": False, "mu": None, "name": "x"},
    ]  # fmt: skip


def test_an_object_is_a_sample(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "prompt_embeds": [[0.5]]}, {"class_labels": 3}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert _samples.read(tmp_path / "p.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.pdf", "x", "ends in .txt, .csv, .jsonl"),
        ("p.txt", "\n \n", "at least one sample"),
        ("p.csv", "prompt\n", "at least one sample"),
        ("p.csv", "prompt,prompt\na,b\n", "each column once"),
        ("p.csv", "prompt,\na,b\n", "each column once"),
        ("p.csv", "prompt,width\na,1\nb\n", r"line 3 of .*p\.csv .*2 fields"),
        ("p.csv", "prompt\na\nb,c\n", r"line 3 of .*p\.csv .*1 fields"),
        ("p.jsonl", '{"a": 1}\n{"a"\n', r"line 2 of .*p\.jsonl .*one JSON object"),
        ("p.jsonl", "[1]\n", r"line 1 of .*p\.jsonl .*one JSON object"),
        ("p.txt", b"\xff\xfe\x00", "can be read"),
    ],
)
def test_an_invalid_file_is_refused_with_the_line(name: str, text: str | bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadOption, match=expected):
        _samples.read(file)


# ----------------------------------------------------------------------- calls


def test_every_prompt_gets_its_seeds() -> None:
    assert [seeds_of(None, row) for row in range(3)] == [[0], [1], [2]]
    assert [seeds_of("5,6", row) for row in range(2)] == [[5, 6], [5, 6]]
    assert [seeds_of("2", row) for row in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for wrong in ("x", "0", "-1", "1,-2", "1.5", ""):
        with pytest.raises(BadOption, match="a list like 0,1,2 or how many"):
            seeds_of(wrong, 0)


class Pipe:
    """Takes these arguments and no others."""

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        guidance_scale: float = 1,
        num_images_per_prompt: int = 1,
        generator: Any = None,
    ) -> None: ...


def seeds(call: dict[str, Any]) -> list[int]:
    return [g.initial_seed() for g in call["generator"]]


def test_samples_that_agree_run_together() -> None:
    rows = [{"prompt": p} for p in "abc"] + [{"prompt": "d", "guidance_scale": 2}, {"prompt": "e"}]
    calls = calls_of(Loaded(Pipe()), rows, None, 2, {"guidance_scale": 5.0, "height": None})
    assert [(c["prompt"], c["guidance_scale"], seeds(c)) for c in calls] == [
        (["a", "b"], 5.0, [0, 1]),
        (["c"], 5.0, [2]),
        (["d"], 2, [3]),  # a value in a row overrides the value for all rows
        (["e"], 5.0, [4]),
    ]
    (call,) = calls_of(Loaded(Pipe()), [{"prompt": "a", "num_images_per_prompt": 2}], None, 2, {})
    assert (call["prompt"], call["num_images_per_prompt"]) == (["a"], 2)
    calls = calls_of(Loaded(Pipe()), [{"prompt": "a", "negative_prompt": "n"}, {"prompt": "b"}], None, 2, {})
    assert [sorted(c) for c in calls] == [["generator", "negative_prompt", "prompt"], ["generator", "prompt"]]


def test_seeds_of_a_row_are_its_own() -> None:
    calls = calls_of(Loaded(Pipe()), [{"prompt": "a", "seed": 9}, {"prompt": "b"}], "0,1", 4, {})
    assert [(c["prompt"], seeds(c)) for c in calls] == [(["a", "b", "b"], [9, 0, 1])]
    with pytest.raises(BadOption, match="seed='9'"):
        calls_of(Loaded(Pipe()), [{"prompt": "a", "seed": "9"}], None, 1, {})
    with pytest.raises(BadOption, match="batch=0"):
        calls_of(Loaded(Pipe()), [{"prompt": "a"}], None, 0, {})


def test_an_argument_that_the_pipeline_does_not_take_is_reported() -> None:
    with pytest.raises(UnknownName, match=r"no argument of Pipe called 'guidance'.*Did you mean 'guidance_scale'"):
        calls_of(Loaded(Pipe()), [{"prompt": "a", "guidance": 2}], None, 1, {})


def test_embeddings_become_tensors_of_the_network() -> None:
    pipe = fresh("sd15_ddim").to(torch.bfloat16)
    rows = [{"prompt_embeds": [[float(n), 0.5]], "seed": n} for n in range(2)]
    (call,) = calls_of(Loaded(pipe), rows, None, 2, {"num_inference_steps": 3})
    assert call["prompt_embeds"].tolist() == [[[0.0, 0.5]], [[1.0, 0.5]]]
    assert call["prompt_embeds"].dtype == torch.bfloat16
    assert call["output_type"] == "latent"
    rows[1]["prompt_embeds"] = [[1.0]]
    with pytest.raises(
        BadOption, match="prompt_embeds cannot be used: the values of the samples have different shapes"
    ):
        calls_of(Loaded(pipe), rows, None, 2, {})


# ---------------------------------------------------------------------- models


MODULE = """
import torch
from pipelines import TINY, fresh

def pipe():
    return fresh("flux")

def with_calls():
    pipe = fresh("dit")
    calls = [TINY["dit"].call(pipe) | {"generator": torch.Generator().manual_seed(k)} for k in range(2)]
    return pipe, calls

def failing():
    pipe, calls = with_calls()
    def stop(inner, *args, **kwargs):
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)
    from diffcache.patch import layer
    layer(pipe, "progress_bar", stop)
    return pipe, calls

begun = []

def number():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module ``mine``, which is the one we stand in."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_a_demo_model_from_prompts_to_profile(command: Command, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ant\nbat\nbear face\n")
    out = tmp_path / "flux.safetensors"
    code, expected, _ = command(
        "demo:flux", "--prompts", tmp_path / "p.txt", "--steps", 3, "--batch", 2, "--sites", "model,block", "--out", out
    )
    assert code == 0
    profile = Profile.load(out)
    assert expected.startswith(profile.describe())
    assert profile.provenance["model"] == "demo:flux"
    assert profile.provenance["prompts"] == "p.txt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flux.safetensors", "p.txt"]  # the folder of parts is gone
    model = assets.load("flux")
    calls = [
        model.call(["ant", "bat"], [0, 1], steps=3, output_type="latent"),
        model.call(["bear face"], [2], steps=3, output_type="latent"),
    ]
    assert timeless(profile) == timeless(diffcache.measure(model.pipe, calls, sites="block"))
    assert diffcache.plan(profile, "closed_loop", 2).computed_steps == 2


def test_a_demo_model_has_default_prompts(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "dit.safetensors"
    assert command("demo:dit", "--steps", 2, "--batch", 16, "--out", out)[0] == 0
    profile = Profile.load(out)
    assert profile.samples == len(assets.load("dit").subjects[:16])
    assert profile.guidance is not None
    assert profile.guidance.scales.get("guidance_scale") in (None, 4.0)


def test_a_function_brings_a_pipeline(command: Command, module: Path) -> None:
    tensors = {n: v.tolist() for n, v in TINY["flux"].call(shared("flux")).items() if isinstance(v, torch.Tensor)}
    row = {name: value[0] for name, value in tensors.items()}
    rest = {n: v for n, v in TINY["flux"].call(shared("flux")).items() if n not in tensors}
    (module / "p.jsonl").write_text("\n".join(json.dumps(row | rest | {"seed": seed}) for seed in (4, 5)))
    assert command("mine:pipe", "--prompts", "p.jsonl", "--batch", 2, "--steps", 6, "--out", "p.safetensors")[0] == 0
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    tensors = {name: torch.tensor([row[name]] * 2) for name in row}
    call = tensors | rest | {"generator": generators, "num_inference_steps": 6, "output_type": "latent"}
    assert timeless(Profile.load("p.safetensors")) == timeless(diffcache.measure(shared("flux"), [call]))


def test_a_function_brings_calls_too(command: Command, module: Path) -> None:
    assert command("mine:with_calls", "--out", "p.safetensors")[0] == 0
    assert Profile.load("p.safetensors").samples == 2
    assert "returns its own calls" in refused(command, "mine:with_calls", "--steps", 3)


def test_a_saved_pipeline_is_loaded_from_its_folder(command: Command, tmp_path: Path) -> None:
    fresh("dit").save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"class_labels": 1}\n{"class_labels": 3}\n')
    out = tmp_path / "p.safetensors"
    words = ("--prompts", tmp_path / "p.jsonl", "--steps", 4, "--guidance", 2, "--device", "cpu", "--out", out)
    assert command(tmp_path / "model", *words, "--batch", 2)[0] == 0
    profile = Profile.load(out)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    call = {"class_labels": [1, 3], "guidance_scale": 2.0, "num_inference_steps": 4, "generator": generators}
    assert timeless(profile) == timeless(diffcache.measure(shared("dit"), [call]))


def test_what_was_stopped_goes_on(command: Command, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["diffcache", "profile", "mine:failing", "--out", "p.safetensors"])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        cli.main()
    assert not Path("p.safetensors").exists()
    assert len(list(Path("p.safetensors.parts").glob("call-*"))) == 1
    assert command("mine:failing", "--out", "p.safetensors")[0] == 0
    assert len(sys.modules["mine"].begun) == 3  # two calls, one of them begun twice
    assert not Path("p.safetensors.parts").exists()
    assert command("mine:with_calls", "--out", "q.safetensors", "--resume", "kept")[0] == 0
    assert len(list(Path("kept").glob("call-*"))) == 2
    assert command("mine:with_calls", "--out", "r.safetensors", "--no-resume")[0] == 0
    assert timeless(Profile.load("q.safetensors")) == timeless(Profile.load("p.safetensors"))


def test_errors_are_one_line_before_anything_is_loaded(command: Command, module: Path) -> None:
    Path("p.txt").write_text("ant\n")
    assert "a file in a folder that exists" in refused(command, "demo:flux", "--steps", 3, "--out", "no/p.safetensors")
    assert "either --resume or --no-resume" in refused(command, "demo:flux", "--resume", "x", "--no-resume")
    assert "steps=None" in refused(command, "demo:flux", "--prompts", "p.txt")
    assert "steps=0" in refused(command, "demo:flux", "--prompts", "p.txt", "--steps", 0)
    assert "one or several of model, stack" in refused(command, "demo:flux", "--steps", 3, "--sites", "layers")
    assert "no demo model called 'flx'" in refused(command, "demo:flx", "--steps", 3)
    assert "dtype='int8'" in refused(command, "demo:flux", "--steps", 3, "--dtype", "int8")
    assert "device='gpu'" in refused(command, "demo:flux", "--steps", 3, "--device", "gpu")
    assert "there is no module 'nobody'" in refused(command, "nobody:pipe", "--steps", 3)
    assert "'mine' has no 'nothing'" in refused(command, "mine:nothing", "--steps", 3)
    assert "a folder, an id on the Hub" in refused(command, "mine:no-name", "--steps", 3)
    assert "a pipeline and calls; it returned int" in refused(command, "mine:number", "--steps", 3)
    assert "ends in .txt, .csv, .jsonl, .safetensors" in refused(command, "mine:pipe", "--steps", 3)
    assert "word='xylophonist'" in refused(command, "demo:flux", *with_prompt("xylophonist"))
    missing = refused(command, "no/such-model", "--prompts", "p.txt", "--steps", 3)
    assert "no folder 'no/such-model' here; as a Hub id it could not be reached" in missing
    assert "no argument of FluxPipeline called 'colour'" in refused(command, "demo:flux", *with_prompt("x", colour=3))
    assert not list(Path.cwd().glob("*.parts"))


def with_prompt(prompt: str, **more: Any) -> tuple[object, ...]:
    Path("q.jsonl").write_text(json.dumps({"prompt": "ant" if more else prompt} | more))
    return "--prompts", "q.jsonl", "--steps", 3
