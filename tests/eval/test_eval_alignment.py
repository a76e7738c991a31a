"""The CLIP score: what open_clip gives by hand, under a name that says the model; and its command."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, command_of, status_of
from PIL import Image

from diffcache.errors import BadOption
from diffcache.eval import folders
from diffcache.eval.alignment import ClipScore, by_chance, score
from diffcache.eval.extractors import PicturesError
from diffcache.eval.folders import PromptsError
from diffcache.eval.requirements import MissingPackageError, WeightsError

pytestmark = pytest.mark.fast

open_clip = pytest.importorskip("open_clip")


NAME = "tiny-clip-of-tests"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PROMPTS = ["a red apple", "a green apple on a table", "a police car", "snow", "the sea at night"]


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of a tiny CLIP that open_clip knows by name while these tests run."""
    from open_clip import factory

    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    known = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    yield path
    factory._MODEL_CONFIG_PATHS[:] = known[0]
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(known[1])


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> ClipScore:
    return ClipScore(NAME, checkpoint, batch_size=2)


def pictures(n: int = 5, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    """uint8 [n, H, W, 3]"""
    random = np.random.default_rng(0)
    return np.clip(random.integers(0, 255, (n, 1, 1, 3)) + random.normal(0, 40, (n, *size, 3)), 0, 255).astype(np.uint8)


def by_hand(checkpoint: Path, batch: np.ndarray, prompts: list[str]) -> np.ndarray:
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=str(checkpoint))
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(Image.fromarray(x)) for x in batch]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(NAME)(prompts), normalize=True)
    return np.asarray(100 * (image * text).sum(1).clamp(min=0), np.float64)


def test_the_score_is_what_open_clip_gives_by_hand(checkpoint: Path, judge: ClipScore) -> None:
    batch = pictures()
    expected = by_hand(checkpoint, batch, PROMPTS)
    found = judge(batch, PROMPTS)
    assert found.dtype == np.float64
    assert found.shape == (5,)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len({round(x, 4) for x in expected[expected > 0]}) > 1  # it distinguishes pairs
    assert np.allclose(judge(batch.astype(np.float32) / 255, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_a_pair_s_score_is_its_own(judge: ClipScore) -> None:
    batch = pictures()
    together = judge(batch, PROMPTS)
    alone = [judge(batch[n : n + 1], [prompt])[0] for n, prompt in enumerate(PROMPTS)]
    assert np.allclose(together, alone, atol=1e-4)
    assert np.allclose(judge(batch[::-1].copy(), PROMPTS[::-1]), together[::-1], atol=1e-4)
    assert not np.allclose(judge(batch, PROMPTS[::-1]), together, atol=1e-2)


def test_what_points_away_scores_nothing() -> None:
    image = np.array([[1.0, 0], [1, 0], [1, 0]])
    text = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert score(image, text).tolist() == [100, 0, 0]


def test_chance_is_the_score_with_the_prompts_of_other_pictures() -> None:
    here = np.eye(3)
    assert by_chance(here, here, ["a", "b", "c"]) == 0
    assert by_chance(here, np.roll(here, 1, axis=0), ["a", "b", "c"]) == pytest.approx(50)
    assert by_chance(here, here, ["a", "a", "a"]) is None
    assert by_chance(here[:1], here[:1], ["a"]) is None
    two = np.array([[1.0, 0], [1, 0], [0, 1]])
    assert by_chance(two, two, ["a", "a", "b"]) == 0  # a picture with its own prompt again is left out


def test_results_are_called_by_their_model_and_weights(judge: ClipScore) -> None:
    assert judge.title == "CLIP score (tiny-clip-of-tests, weights.pt)"


def test_a_long_prompt_is_cut_and_the_picture_s_size_does_not_matter(judge: ClipScore) -> None:
    assert judge(pictures(1), ["word " * 200]).shape == (1,)
    assert judge(pictures(2, size=(20, 90)), PROMPTS[:2]).shape == (2,)


# --- a folder of transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of a tiny CLIPModel, and a processor that knows single letters."""
    transformers = pytest.importorskip("transformers")
    found = tmp_path_factory.mktemp("saved") / "tiny-clip"
    found.mkdir()
    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    (found / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate([*letters, *ends])}))
    (found / "merges.txt").write_text("#version: 0.2\n")
    words = transformers.CLIPTokenizer(str(found / "vocab.json"), str(found / "merges.txt"))
    sizes = {"shortest_edge": 32}, {"height": 32, "width": 32}
    picture = transformers.CLIPImageProcessor(size=sizes[0], crop_size=sizes[1])
    transformers.CLIPProcessor(picture, words).save_pretrained(found)
    each = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**each, "vocab_size": len(letters) + 2, "max_position_embeddings": 24, "eos_token_id": len(letters) + 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**each, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(found)
    return found


def test_a_folder_of_transformers_scores_as_its_model_does(folder: Path) -> None:
    import transformers

    judge = ClipScore(folder, batch_size=2)
    assert judge.title == "CLIP score (tiny-clip)"
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    images = [Image.fromarray(picture) for picture in pictures()]
    given = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True, truncation=True, max_length=24)
    with torch.no_grad():
        out = model(**given)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    assert np.allclose(judge(pictures(), PROMPTS), expected, atol=1e-4)
    assert not np.allclose(judge(pictures(), PROMPTS[::-1]), expected, atol=1e-2)
    assert judge(pictures(1), ["word " * 200]).shape == (1,)


def test_the_command_takes_a_folder(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command_of(monkeypatch, capsys, "eval", "clip")
    code, line, complaint = run(made, made.parent / "prompts.txt", "--model", folder)
    assert (code, complaint) == (0, "")
    assert re.fullmatch(r"CLIP score \(tiny-clip\) \S+ ± \S+  N 5  floor \S+ \(prompts of other pictures\)\n", line)


def test_a_folder_without_a_clip_model_or_with_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be loaded as a CLIP model: .*by save_pretrained") as refused:
        ClipScore(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(BadOption, match="none together with the folder"):
        ClipScore(folder, "openai")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_numbers_of_prompts_are_refused(judge: ClipScore) -> None:
    with pytest.raises(PicturesError, match="4 prompts for 5 pictures"):
        judge(pictures(), PROMPTS[:4])
    with pytest.raises(PicturesError, match="one text for 5 pictures"):
        judge(pictures(), "abcde")


def test_weights_that_are_not_here_are_one_error_that_says_what_to_pass() -> None:
    with pytest.raises(WeightsError) as refused:
        ClipScore("ViT-B-32", "laion2b_s34b_b79k")
    said = str(refused.value)
    assert "\n" not in said
    for words in ("'laion2b_s34b_b79k' of the CLIP model ViT-B-32", "--pretrained FILE"):
        assert words in said


def test_an_unknown_model_or_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"ViT-B-33.*ViT-B-32"):
        ClipScore("ViT-B-33")
    with pytest.raises(BadOption, match=r"a tag of ViT-B-32: .*openai"):
        ClipScore("ViT-B-32", tmp_path / "nowhere.pt")
    with pytest.raises(BadOption, match="it has none"):
        ClipScore(NAME, "openai")
    with pytest.raises(BadOption, match="a tag or a file of weights"):
        ClipScore(NAME, "")
    with pytest.raises(BadOption, match="batch_size"):
        ClipScore(NAME, batch_size=0)


@pytest.mark.parametrize("content", ["other", "text"])
def test_a_file_of_other_weights_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    if content == "other":
        torch.save({"weight": torch.zeros(2)}, path)
    else:
        path.write_text("no weights")
    with pytest.raises(WeightsError, match="cannot be loaded into the CLIP model tiny-clip-of-tests"):
        ClipScore(NAME, path)


class Trap:
    """Leaves a file where it is unpickled by something that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(WeightsError):
        ClipScore(NAME, path)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_tag_s_weights_get_the_activation_they_were_trained_with(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    tag = {"url": "", "hf_hub": "", "quick_gelu": True}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, name: tag)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda settings: str(checkpoint))
    real = open_clip.create_model_and_transforms

    def create(model: str, pretrained: str, **options: Any) -> Any:
        seen.update(options)
        return real(model, pretrained=str(checkpoint), **options)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = ClipScore(NAME, "openai")
    assert seen["force_quick_gelu"] is True
    assert any(type(m).__name__ == "QuickGELU" for m in made._encoder.network.modules())
    tag["quick_gelu"] = False
    assert not any(type(m).__name__ == "QuickGELU" for m in ClipScore(NAME, "openai")._encoder.network.modules())


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingPackageError, match=r"'open_clip'.*pip install 'diffcache\[eval\]'"):
        ClipScore()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path) -> Command:
    """With the tiny model."""
    run = command_of(monkeypatch, capsys, "eval", "clip")
    return lambda *words: run(*words, "--model", NAME, "--pretrained", checkpoint)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Five pictures of two sizes, and prompts both ways: lines, and files in the folder of the pictures."""
    folder = tmp_path / "made"
    folder.mkdir()
    for n, prompt in enumerate(PROMPTS):
        Image.fromarray(pictures(5, (48, 40) if n % 2 else (32, 32))[n]).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"{prompt}\n")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


def test_the_command_prints_what_the_library_finds(made: Path, command: Command, judge: ClipScore) -> None:
    paths = folders.pictures(made)
    expected = [judge(folders.read(path)[None], [prompt])[0] for path, prompt in zip(paths, PROMPTS, strict=True)]
    code, text, complaint = command(made, made.parent / "prompts.txt", "--json", "--batch-size", 2)
    assert (code, complaint) == (0, "")
    found = json.loads(text)
    assert list(found["values"]) == [path.name for path in paths]
    assert np.allclose(list(found["values"].values()), expected, atol=1e-4)
    assert found["value"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["standard_error"] == pytest.approx(np.std(expected, ddof=1) / 5**0.5, abs=1e-3)
    assert (found["name"], found["samples"]) == (judge.title, 5)
    code, line, _ = command(made, made)
    assert code == 0
    assert line.count("\n") == 1
    for words in (f"{judge.title} {found['value']:.5g} ± ", "N 5", f"floor {found['floor']:.5g}"):
        assert words in line


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda made: (made.parent / "prompts.txt").write_text("one\ntwo\n"), "has 2 prompts for 5 pictures"),
        (lambda made: (made.parent / "prompts.txt").write_text("a\n\nb\nc\nd\n"), "line 2 of "),
        (lambda made: (made.parent / "prompts.txt").write_bytes(b"\xff\xfe\xff"), "text in UTF-8"),
        (lambda made: (made.parent / "prompts.txt").unlink(), "prompts="),
        (lambda made: (made / "3.png").write_bytes(b"no picture"), "3.png cannot be read as a picture"),
        (lambda made: [path.unlink() for path in made.glob("*.png")], "with pictures in it"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    made: Path, command: Command, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(made)
    code, out, complaint = command(made, made.parent / "prompts.txt")
    assert (code, out) == (status_of(complaint), "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert said in complaint


def test_a_picture_without_its_prompt_is_named(made: Path, command: Command) -> None:
    (made / "3.txt").unlink()
    code, _, complaint = command(made, made)
    assert code == status_of(complaint)
    assert "no prompt for 1 of 5 pictures, first for 3.png" in complaint
    (made / "3.txt").write_text(" \n")
    assert "3.txt is empty" in command(made, made)[2]


def test_prompts_follow_the_names_not_the_order_on_disk(made: Path) -> None:
    (made / "0.png").rename(made / "9.png")
    (made / "0.txt").rename(made / "9.txt")
    paths = folders.pictures(made)
    assert [path.name for path in paths] == ["1.png", "2.png", "3.png", "4.png", "9.png"]
    assert folders.prompts(made, paths) == [*PROMPTS[1:], PROMPTS[0]]
    assert folders.prompts(made.parent / "prompts.txt", paths) == PROMPTS
    with pytest.raises(PromptsError):
        folders.prompts(made.parent / "prompts.txt", paths[:3])
