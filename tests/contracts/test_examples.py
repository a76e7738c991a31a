"""The examples do what they say, on small pipelines; and what they ask of the real ones, these take."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from pipelines import TINY, fresh
from torch import Tensor

from diffcache import CacheSchedule, accelerated, estimate, evaluate, optimize, report, restore
from diffcache.assets import DemoModel, load
from diffcache.errors import BadOption
from diffcache.eval import Distribution, extractors

FOLDER = Path(__file__).parents[2] / "examples"
MOST_LINES = 39
STEPS = 8

# example -> the class whose calls it makes, None for its own; what it takes from the Hub
EXAMPLES: dict[str, tuple[type | None, set[str]]] = {
    "flux": (diffusers.FluxPipeline, {"black-forest-labs/FLUX.1-dev"}),
    "wan": (diffusers.WanPipeline, {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}),
    "sdxl": (diffusers.StableDiffusionXLPipeline, {"stabilityai/stable-diffusion-xl-base-1.0"}),
    "dit_fid": (diffusers.DiTPipeline, {"facebook/DiT-XL-2-256"}),
    "own_pipeline": (None, {"facebook/DiT-XL-2-256"}),
}

EACH = pytest.mark.parametrize("name", EXAMPLES)


def example(name: str) -> ModuleType:
    """The script, read anew."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_calls(name: str, number: int, **over: Any) -> list[dict[str, Any]]:
    """Embeddings in the place of prompts: calls of one sample each, every one its own prompt and seed."""
    together = TINY[name].call(None, batch=number)
    return [
        {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in together.items()}
        | {"generator": torch.Generator().manual_seed(i), "output_type": "pil", **over}
        for i in range(number)
    ]


@functools.cache
def dit() -> DemoModel:
    return load("dit")


def colours(pictures: Tensor) -> Tensor:
    """An extractor of our own: [N, 3, H, W] -> mean and spread of each colour, [N, 6]."""
    return torch.cat([pictures.mean((2, 3)), pictures.std((2, 3))], dim=1)


def predicted(printed: str) -> list[int]:
    """Of every row in the printed reports."""
    return [int(n) for n in re.findall(r"^(?:transformer|unet) +\S+ +\d+ +\d+ +(\d+)", printed, re.MULTILINE)]


def picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], and more than one colour in it."""
    found = np.asarray(Image.open(path))
    assert found.ndim == 3
    assert found.shape[2] == 3
    assert found.std() > 0
    return found


# What they do.


def test_flux_saves_a_schedule_and_draws_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux, pipe, calls = example("flux"), fresh("flux"), tiny_calls("flux", 4, num_inference_steps=STEPS)
    flux.COMPUTED = 4
    with mock.patch.object(flux, "optimize", wraps=optimize) as fitting:
        flux.main(pipe, calls, tmp_path / "made")
    assert fitting.call_args.args == (pipe, calls[:3], 4)
    schedule = CacheSchedule.load(tmp_path / "made/schedule.safetensors")
    assert schedule.computed_steps == 4
    printed = capsys.readouterr().out
    assert "4 of 8 steps computed" in printed
    assert predicted(printed) == [STEPS - 4]

    restore(pipe)
    last = {**calls[-1], "generator": torch.Generator().manual_seed(3)}
    with accelerated(pipe, schedule):
        wanted = pipe(**last).images[0]
    np.testing.assert_array_equal(picture(tmp_path / "made/picture.png"), np.asarray(wanted))


def test_wan_says_beforehand_what_the_cache_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("wan").main(fresh("wan"), tiny_calls("wan", 2), tmp_path / "made")
    printed = capsys.readouterr().out
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6}
    said = re.findall(r"([\d.,]+) (bytes|kB|MB) of cache at most", printed)
    exact, int8 = (float(n.replace(",", "")) * factor[unit] for n, unit in said)
    held = re.search(r"at most ([\d,]+) bytes$", printed, re.MULTILINE)
    assert held is not None
    assert int8 < exact / 2
    assert int(held.group(1).replace(",", "")) == pytest.approx(int8, rel=0.01)
    assert printed.count("block:blocks.") == printed.count(" int8 ") == 6  # three blocks, two branches
    assert predicted(printed) == [3] * 6  # of six steps every second
    first, second = (Image.open(tmp_path / f"made/{n}.gif") for n in (0, 1))
    assert first.n_frames == second.n_frames == 9
    frames = [[np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(video)] for video in (first, second)]
    assert frames[0][0].std() > 0
    assert not np.array_equal(*(video[0] for video in frames))


def test_sdxl_is_judged_by_calls_it_was_not_fitted_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdxl, pipe, calls = example("sdxl"), fresh("sdxl"), tiny_calls("sdxl", 6, num_inference_steps=STEPS)
    sdxl.COMPUTED = 4
    with mock.patch.object(sdxl, "optimize", wraps=optimize) as fitting:
        sdxl.main(pipe, calls, tmp_path / "made")
    fitted = fitting.call_args.args[1]
    record = json.loads((tmp_path / "made/record.json").read_text())
    assert [call["generator"].initial_seed() for call in fitted] == [0, 2, 4]
    assert [sample["seed"] for sample in record["samples"]] == [1, 3, 5]
    work = {m["name"]: (m["kind"], m["steps"], m["computed_steps"]) for m in record["methods"]}
    assert work == {
        "full run": ("full", STEPS, STEPS),
        "diffcache": ("ours", STEPS, 4),
        "4 steps, Euler": ("fewer steps", 4, 4),
        "4 steps, DPM-Solver++": ("fewer steps", 4, 4),
    }
    (plan,) = next(m for m in record["methods"] if m["kind"] == "ours")["schedule"]["denoisers"].values()
    assert list(plan) == ["model"]
    assert CacheSchedule.load(tmp_path / "made/schedule.safetensors").computed_steps == 4
    for method in record["methods"]:
        assert np.isfinite(method["seconds"]["loop"]["median"])
        assert [picture(tmp_path / "made" / path).shape for path in method["pictures"].values()] == [(32, 24, 3)] * 3
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in work)
    page = tmp_path / "made/report.html"
    assert printed.rstrip().endswith(f"open {page}")
    assert all(name in page.read_text() for name in work)
    with pytest.raises(BadOption):  # nothing was left on the pipeline
        report(pipe)


def test_dit_is_measured_against_real_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = tmp_path / "real"
    real.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(real / f"{number:02d}.png")
    calls = [{"class_labels": labels, "num_inference_steps": STEPS, "output_type": "np"} for labels in ([0, 1], [2, 3])]
    fid, pipe = example("dit_fid"), dit().pipe
    fid.main(pipe, calls, tmp_path / "made", real, extractor=f"{__name__}:colours")

    found = json.loads((tmp_path / "made/distances.json").read_text())
    assert list(found) == list(fid.METHODS)
    extractor = extractors.load(f"{__name__}:colours")
    for method, distance in found.items():
        wanted = Distribution(extractor, resamples=0)
        wanted.add(pixels, real=True)
        with accelerated(pipe, method):
            for seed, call in enumerate(calls):
                wanted.add(pipe(**call, generator=torch.Generator().manual_seed(seed)).images)
        assert distance["value"] == pytest.approx(wanted.compute().value, rel=1e-6)
        assert (distance["samples"], distance["reference_samples"]) == (4, 20)
        assert 0 < distance["floor"]["value"] < distance["value"]
    assert len({distance["value"] for distance in found.values()}) == len(fid.METHODS)
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(m)}: FD-colours .* floor \d", printed, re.MULTILINE) for m in fid.METHODS)
    assert predicted(printed) == [0, 4, 5]  # of eight steps
    with pytest.raises(BadOption):  # nothing was left on the pipeline
        report(pipe)


def own(module: ModuleType) -> Any:
    parts = dit().pipe
    pipe = module.MyPipeline(parts.transformer, parts.scheduler, parts.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_calls(number: int) -> list[dict[str, Any]]:
    noise = torch.randn(number, 2, 8, 16, 16, generator=torch.Generator().manual_seed(5))
    return [{"latents": x, "labels": torch.tensor([0, 3]), "num_inference_steps": STEPS} for x in noise]


def test_an_own_loop_is_accelerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("own_pipeline")
    module.main(own(module), own_calls(2), tmp_path / "made")
    assert predicted(capsys.readouterr().out) == [5, 5]
    exact = [one for call in own_calls(2) for one in own(module)(**call).images]
    for number, one in enumerate(exact):
        found, wanted = picture(tmp_path / f"made/{number}.png").astype(float), np.asarray(one, float)
        assert 0 < np.square(found - wanted).mean() < np.square(found.mean() - wanted).mean()
    assert len(list((tmp_path / "made").iterdir())) == 4


def test_an_own_loop_draws_what_the_pipeline_of_diffusers_draws() -> None:
    """Else it would be a poor example of a loop."""
    call, pipe = own_calls(1)[0], dit().pipe
    with mock.patch.object(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", return_value=call["latents"]):
        wanted = pipe(class_labels=[0, 3], guidance_scale=4.0, num_inference_steps=STEPS, output_type="pil").images
    for a, b in zip(own(example("own_pipeline"))(**call).images, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1)


def test_an_own_loop_is_taken_by_all_the_others(tmp_path: Path) -> None:
    pipe, calls = own(example("own_pipeline")), own_calls(3)
    schedule = optimize(pipe, calls[:2], 4)
    assert schedule.provenance["fit_target"] == "state"
    assert estimate(pipe, schedule, **calls[0]).compute_fraction == pytest.approx(0.5)
    found = evaluate(pipe, {"ours": schedule}, calls[2:], compare=(), out=tmp_path, progress=False)
    assert found.record["methods"][1]["computed_steps"] == 4


# What they are.


@EACH
def test_it_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= MOST_LINES


def test_all_of_them_are_known_here_and_in_their_readme() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == EXAMPLES.keys()
    commands = re.findall(r"^\| `python examples/(\w+)\.py[^`]*` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert commands == list(EXAMPLES)


@EACH
def test_the_last_lines_make_calls_that_the_real_pipeline_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines under ``if __name__ == "__main__"``, with stand-ins for what comes from the Hub and for ``main``."""
    kind, wanted = EXAMPLES[name]
    module = example(name)
    (block,) = (node for node in ast.parse((FOLDER / f"{name}.py").read_text()).body if isinstance(node, ast.If))
    classes = {key for key, value in vars(module).items() if isinstance(value, type) and value is not Path}
    stand_ins = {key: mock.MagicMock() for key in classes}
    main = mock.Mock()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "real"])
    exec(compile(ast.Module(block.body, []), name, "exec"), {**vars(module), **stand_ins, "main": main})

    assert {one.from_pretrained.call_args.args[0] for one in stand_ins.values() if one.from_pretrained.called} == wanted
    (arguments,) = main.call_args_list
    inspect.signature(module.main).bind(*arguments.args, **arguments.kwargs)
    _, calls, out = arguments.args
    assert out.name.endswith("-example")
    taken = inspect.signature((kind or module.MyPipeline).__call__)
    for call in calls:
        taken.bind(None, **call)
    if name in ("flux", "sdxl"):
        assert {call["num_inference_steps"] for call in calls} == {28 if name == "flux" else 30}
        assert len({call["prompt"] for call in calls}) == len(calls)
        assert len({call["generator"].initial_seed() for call in calls}) == len(calls)
        fitted = len(calls) - 1 if name == "flux" else len(calls[::2])
        assert 15 <= fitted < 20
    if name == "dit_fid":
        labels = [label for call in calls for label in call["class_labels"]]
        assert np.bincount(labels).tolist() == [10] * 1000  # every class of ImageNet, equally often
        assert arguments.kwargs == {"real": Path("real")}
