"""Pipelines that are saved without text encoders load, and take embeddings from a file in the place of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command_of
from pipelines import TINY, fresh, shared
from safetensors.torch import save_file
from torch import Tensor

import diffcache
from diffcache.cli import _samples
from diffcache.documents import Profile
from diffcache.errors import BadOption

CALL = TINY["flux"].call(None)
IMAGE = {name: CALL[name] for name in ("height", "width", "guidance_scale")}


def embeddings(batch: int) -> dict[str, Tensor]:
    found = TINY["flux"].call(None, batch=batch).items()
    return {name: value for name, value in found if isinstance(value, Tensor)}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


@pytest.fixture(params=["null in the index", "no folder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Flux without encoders. They are null in its index, or named there and their folders are missing."""
    monkeypatch.chdir(tmp_path)
    fresh("flux").save_pretrained("my-flux")
    index = Path("my-flux/model_index.json")
    listed = json.loads(index.read_text())
    assert listed["text_encoder"] == [None, None]
    if request.param == "no folder":
        listed |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        listed |= {"text_encoder_2": ["transformers", "T5EncoderModel"]}
        index.write_text(json.dumps(listed))
    save_file(embeddings(3), "embeds.safetensors")
    Path("p.txt").write_text("a cat\n")
    return Path("my-flux")


SIZE = ("--height", IMAGE["height"], "--width", IMAGE["width"], "--guidance", IMAGE["guidance_scale"])
WORDS = ("--steps", 6, "--device", "cpu", *SIZE)


def options(**more: Any) -> dict[str, Any]:
    return {"num_inference_steps": 6, "output_type": "latent"} | IMAGE | more


def test_embeddings_from_a_file_take_the_place_of_prompts(command: Command, folder: Path) -> None:
    words = ("--prompts", "embeds.safetensors", "--batch", 2, "--out", "p.safetensors")
    code, _, complaint = command("profile", folder, *words, *WORDS)
    assert code == 0, complaint
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    rows = embeddings(3)
    calls = [
        options(generator=generators[part], **{name: value[part] for name, value in rows.items()})
        for part in (slice(0, 2), slice(2, 3))
    ]
    found, wanted = Profile.load("p.safetensors"), diffcache.measure(shared("flux"), calls)
    assert found.samples == 3
    assert found.dynamics is not None
    for name in ("steps", "samples", "dynamics", "guidance"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.parametrize("verb", ["profile", "eval"])
def test_text_for_a_pipeline_without_encoders_is_refused_with_the_arguments_that_are_needed(
    command: Command, folder: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)  # a call of it is another error
    first = ("profile", folder) if verb == "profile" else ("eval", "run", folder, "uniform:every=2")
    code, out, complaint = command(*first, "--prompts", "p.txt", *WORDS)
    assert (code, out) == (2, "")
    assert complaint.startswith("error: prompts='prompt as text, for a pipeline that is saved without text_encoder, ")
    assert "a .safetensors file with pooled_prompt_embeds, prompt_embeds" in sorted_names(complaint)
    assert "negative_prompt_embeds" in complaint
    Path("rows.jsonl").write_text('{"seed": 1}\n')
    assert "no embeddings, for a pipeline" in command(*first, "--prompts", "rows.jsonl", *WORDS)[2]


def sorted_names(complaint: str) -> str:
    """The complaint with the names that follow "file with" in order of the alphabet."""
    head, _, rest = complaint.partition("file with ")
    names, _, rest = rest.partition(", one row")
    return f"{head}file with {', '.join(sorted(names.split(', ')))}, one row{rest}"


def test_a_network_whose_folder_is_missing_is_named(command: Command, folder: Path) -> None:
    (folder / "transformer").rename("elsewhere")
    code, _, complaint = command("profile", folder, "--prompts", "embeds.safetensors", *WORDS)
    assert code == 1
    assert complaint.startswith("error: the folder 'my-flux' lacks the folder 'transformer' that its model_index.json")


def test_pictures_need_a_vae(command: Command, folder: Path) -> None:
    (folder / "vae").rename("elsewhere")
    words = ("--prompts", "embeds.safetensors", *WORDS)
    complaint = command("eval", "run", folder, "uniform:every=2", *words)[2]
    assert "model='my-flux' was given. Allowed: a pipeline with its vae" in complaint
    assert command("profile", folder, *words, "--out", "p.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "with rows: nothing"),
        ({"prompt_embeds": torch.zeros(2, 3), "pooled_prompt_embeds": torch.zeros(3, 3)}, "one row for each prompt"),
        ({"prompt_embeds": torch.tensor(1.0)}, "with rows: prompt_embeds 0"),
        ({"embeddings": torch.zeros(2, 3)}, "with a tensor 'embeddings'"),
        ({"seed": torch.zeros(2)}, "with a tensor 'seed'"),
        ({"prompt": torch.zeros(2)}, "with a tensor 'prompt'"),
    ],
    ids=str,
)
def test_a_file_of_embeddings_that_does_not_fit_is_refused(
    tensors: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(BadOption) as refused:
        _samples.read(tmp_path / "e.safetensors")
    assert says in str(refused.value)


def test_a_damaged_or_missing_file_of_embeddings_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(BadOption, match="no such file"):
        _samples.read(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(BadOption, match="a safetensors file of embeddings"):
        _samples.read(path)


def test_rows_keep_their_type_and_shape(tmp_path: Path) -> None:
    embeds = torch.randn(2, 3, 4).bfloat16()
    save_file(
        {"prompt_embeds": embeds, "prompt_embeds_mask": torch.tensor([[1, 0], [1, 1]])}, tmp_path / "e.safetensors"
    )
    rows = _samples.read(tmp_path / "e.safetensors")
    assert [sorted(row) for row in rows] == [["prompt_embeds", "prompt_embeds_mask"]] * 2
    assert torch.equal(torch.stack([row["prompt_embeds"] for row in rows]), embeds)
    assert rows[1]["prompt_embeds_mask"].dtype == torch.int64
