"""What can be known before a command loads a model is checked before it loads one; every error is one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import command_of, status_of
from documents import profile
from pipelines import TINY, fresh, shared
from policies import ACTION, HORIZON, Transformer
from probes import bound, hold
from torch import Tensor
from tqdm import tqdm

import diffcache
from diffcache import assets, cli
from diffcache.cli import _models
from diffcache.demo import run as demo_run
from diffcache.documents import CacheSchedule, Guidance, Profile, ScheduleSet
from diffcache.errors import DiffCacheError
from diffcache.eval import alignment, extractors


class HasLoadedError(Exception):
    """A model was loaded."""


MODULE = """
def pipe():
    raise LookupError("the model is loaded")

def policy():
    raise LookupError("the model is loaded")

def play(policy, episodes):
    return [True] * episodes

def brightness(pictures, prompts):
    return pictures.mean(axis=(1, 2, 3))

text = "no function"
"""

STEPS = TINY["dit"].call(shared("dit"))["num_inference_steps"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines as they are saved, a schedule of one of them, and a profile."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("dit", "sd15_ddim"):
        fresh(name).save_pretrained(folder / name)
    pipe = shared("dit")
    guidance = Guidance(mode="batched", branches=2, scales={"guidance_scale": 4.0})
    six, eight = (bound(pipe, hold(mask, 2), guidance=guidance) for mask in ("#.#.#.", "#.#.#.#."))
    six.save(folder / "six.safetensors")
    ScheduleSet.of(six, eight).save(folder / "several.json")
    profile(steps=12, start=0).save(folder / "profile.safetensors")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files for the command; nothing can be loaded."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise HasLoadedError

    for owner, name in (
        (diffusers.DiffusionPipeline, "from_pretrained"),
        (assets, "load"),
        (demo_run, "load"),  # whoever imported it first
        (alignment, "ClipScore"),
        (extractors, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for file in models.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "labels.csv").write_text("class_labels\n1\n3\n")
    (tmp_path / "words.csv").write_text("class_labels\ncat\n")
    (tmp_path / "headless.csv").write_text("3\n1\n")
    (tmp_path / "colour.csv").write_text("class_labels,colour\n1,red\n")
    (tmp_path / "halves.csv").write_text("class_labels,num_inference_steps\n1,2.5\n")
    (tmp_path / "seeds.csv").write_text("class_labels,seed\n1,-3\n")
    (tmp_path / "ragged.jsonl").write_text('{"prompt_embeds": [[1.0]]}\n{"prompt_embeds": [[1.0, 2.0]]}\n')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty").mkdir()
    from PIL import Image

    for name in ("pictures", "two/ours-1", "two/ours-2", "two/full-3"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "0.png")
    return tmp_path


PROFILE = ("profile", "dit", "--prompts", "labels.csv", "--steps", 6)
RUN = ("eval", "run", "dit", "uniform:every=2", "--prompts", "labels.csv", "--steps", 6)
POLICY = ("eval", "policy", "mine:policy", "uniform:every=2")
FID = ("eval", "fid", "pictures", "pictures")
CLIP = ("eval", "clip", "pictures", "p.txt")

SHARED = [  # of `profile` and of `eval run`
    (("--prompts", "none.csv"), "none.csv"),
    (("--prompts", "mine.py"), "ends in .txt, .csv, .jsonl"),
    (("--prompts", "words.csv"), "whole numbers"),
    (("--prompts", "headless.csv"), "which is not the name of an argument"),
    (("--prompts", "colour.csv"), "no argument of DiTPipeline called 'colour'"),
    (("--prompts", "colour.csv"), "It is a column of colour.csv."),
    (("--prompts", "halves.csv"), "num_inference_steps=2.5"),
    (("--prompts", "seeds.csv"), "seed=-3"),
    (("--prompts", "p.txt"), "a .csv file with a column class_labels"),
    (("--prompts", "ragged.jsonl", "--batch", 2), "different shapes or types"),
    (("--steps", 0), "steps=0"),
    (("--steps", -4), "steps=-4"),
    (("--steps", 10**9), "num_inference_steps=1000000000"),
    (("--seeds", "0,x"), "seeds='0,x'"),
    (("--seeds", ""), "seeds=''"),
    (("--batch", 0), "batch=0"),
    (("--guidance", "nan"), "guidance_scale"),
    (("--height", 64), "no argument of DiTPipeline called 'height'"),
    (("--dtype", "int8"), "dtype='int8'"),
    (("--device", "gpu"), "device='gpu'"),
    (("--device", "meta"), "device='meta'"),
    (("--out", "mine.py/out"), "out="),
    (("--out", "x" * 8000), "out="),
    (("--out", "/proc/none/out"), "out="),
]

REFUSED: list[tuple[tuple[object, ...], str]] = [
    *(((*PROFILE, *words), says) for words, says in SHARED),
    *(((*RUN, *words), says) for words, says in SHARED),
    (("profile", "dit", "--steps", 6), "prompts=None"),
    (("profile", "dit", "--prompts", "labels.csv"), "steps=None"),
    (("profile", "demo:flux"), "steps=None"),
    (("profile", "demo:flux", "--steps", 0), "steps=0"),
    (("profile", "demo:flx", "--steps", 6), "no demo model called 'flx'"),
    (("profile", "mine:pipe", "--steps", 0), "steps=0"),
    (("profile", "mine:no-name", "--steps", 6), "package.module:function"),
    (("profile", "no-such-folder", *PROFILE[2:]), "error: no folder 'no-such-folder' here; as a Hub id it"),
    (("profile", "no/such/folder", *PROFILE[2:]), "no folder 'no/such/folder' here"),
    (("profile", "x" * 8000, *PROFILE[2:]), "no folder"),
    (("profile", "empty", *PROFILE[2:]), "holds no diffusers pipeline"),
    (("profile", "six.safetensors", *PROFILE[2:]), "is a file"),
    ((*PROFILE, "--sites", "layers"), "sites='layers'"),
    ((*PROFILE, "--influence-steps", -1), "influence_steps=-1"),
    ((*PROFILE, "--resume", "mine.py"), "resume="),
    ((*PROFILE, "--out", "empty"), "out="),
    ((*PROFILE, "--out", "none/p.safetensors"), "a file in a folder that exists"),
    ((*RUN[:3], "six.safetensors", "--prompts", "labels.csv", "--steps", 20), "made for 6 steps; this call takes 20"),
    ((*RUN[:3], "six.safetensors", *RUN[4:], "--guidance", 1.5), "guidance_scale=4"),
    (("eval", "run", "sd15_ddim", "six.safetensors", "--prompts", "p.txt", "--steps", 6), "'transformer'|DDIM"),
    (("eval", "run", "demo:dit", "six.safetensors", "--steps", 20), "made for 6 steps; this call takes 20"),
    ((*RUN[:3], "several.json", "--prompts", "labels.csv", "--steps", 20), "Covered: 6, 8 steps"),
    ((*RUN[:3], "several.json", *RUN[4:], "--guidance", 1.5), "guidance_scale=4"),
    (("eval", "run", "sd15_ddim", "several.json", "--prompts", "p.txt", "--steps", 6), "'transformer'|DDIM"),
    (("eval", "run", "demo:dit", "several.json", "--steps", 20), "Covered: 6, 8 steps"),
    ((*RUN, "--profile", "several.json"), "'diffcache.schedule_set'. Allowed: 'diffcache.profile'"),
    (("show", "several.json", "--plot", "x.png"), "Choose one: --steps 6"),
    ((*RUN[:3], "none.safetensors", *RUN[4:]), "no such file"),
    ((*RUN[:3], "profile.safetensors", *RUN[4:]), "profile.safetensors"),
    ((*RUN[:3], "unifrom:every=2", *RUN[4:]), "Did you mean 'uniform'?"),
    ((*RUN[:3], "x" * 8000, *RUN[4:]), "no rule called"),
    ((*RUN[:3], "x" * 300 + "=full", *RUN[4:]), "name="),
    ((*RUN[:3], "uniform:every=2", "uniform:every=2", *RUN[4:]), "a different name for each"),
    ((*RUN, "--store", "int7"), "store='int7'"),
    ((*RUN, "--metrics", "psnrr"), "no metric called 'psnrr'"),
    ((*RUN, "--metrics", "lpips"), "alexnet"),
    ((*RUN, "--scorer", "mine:none"), "has no 'none'"),
    ((*RUN, "--scorer", "brightness"), "scorer='brightness'"),
    ((*RUN, "--scorer", "mine:brightness", "--scorer", "mine:brightness"), "scorers="),
    ((*RUN, "--real", "pictures"), "real cannot be used"),
    ((*RUN, "--profile", "none.safetensors"), "no such file"),
    ((*RUN, "--profile", "six.safetensors"), "six.safetensors"),
    ((*RUN, "--title", "a \udcff"), "title="),
    ((*POLICY, "--episodes", 0), "episodes=0"),
    ((*POLICY, "--play", "mine:none"), "has no 'none'"),
    ((*POLICY, "--metrics", "actoin"), "no metric called 'actoin'"),
    ((*POLICY, "--store", "int7"), "store='int7'"),
    ((*POLICY, "--profile", "none.safetensors"), "no such file"),
    ((*POLICY, "--dtype", "int8"), "dtype='int8'"),
    ((*POLICY, "--play", "mine:text"), "a function; 'text' of 'mine' is a str"),
    ((*POLICY, "--play", "nobody:play"), "there is no module 'nobody'"),
    ((*POLICY, "--device", "gpu"), "device='gpu'"),
    ((*POLICY, "--out", "mine.py/out"), "out="),
    ((*POLICY, "--title", "a \udcff"), "title="),
    (("eval", "policy", "dit", "uniform:every=2"), "package.module:function"),
    (("eval", "policy", "mine:policy", "unifrom"), "Did you mean 'uniform'?"),
    ((*FID, "--batch-size", 0), "batch_size=0"),
    ((*FID, "--resamples", -1), "resamples=-1"),
    ((*FID, "--device", "gpu"), "device='gpu'"),
    ((*FID, "--save-statistics", "none/s.safetensors"), "save_statistics="),
    (("eval", "fid", "pictures", "empty"), "a folder with pictures in it"),
    (("eval", "fid", "pictures", "."), "or one of its 1 folders with pictures, such as pictures"),
    (("eval", "fid", "none", "pictures"), "a folder that exists, with pictures in it. In .: pictures."),
    (("eval", "fid", "none/none", "pictures"), "folder='none/none' was given. Allowed: a folder that exists"),
    (("eval", "fid", "pictures", "two/ours"), "one of the 2 folders that begin so: ours-1, ours-2"),
    (("eval", "fid", "pictures", "two/theirs"), "In two: full-3, ours-1, ours-2"),
    (("eval", "fid", "pictures"), "folder=None"),
    ((*CLIP, "--batch-size", 0), "batch_size=0"),
    ((*CLIP, "--device", "gpu"), "device='gpu'"),
    (("eval", "clip", "pictures", "none.txt"), "prompts="),
    (("eval", "clip", "empty", "p.txt"), "a folder with pictures in it"),
    (("demo", "--out", "mine.py"), "out="),
    (("demo", "--out", "mine.py/out"), "out="),
    (("plan", "profile.safetensors", "--steps", 4, "--out", "none/s.safetensors"), "out="),
    (("plan", "none.safetensors", "--steps", 4, "--scheduler", "unifrom"), "Did you mean 'uniform'?"),
    (("plan", "none.safetensors", "--steps", 4, "--scheduler", "meancache:gama=4"), "no option of 'meancache'"),
    (("plan", "none.safetensors", "--steps", 0), "computed_steps=0"),
    (("plan", "dit", "--steps", 4), "folder"),
    (("show", "dit"), "holds a diffusers pipeline"),
    (("show", "six.safetensors", "--plot", "none/x.png"), "plot="),
    (("show", "x" * 8000), "x" * 60),
]


@pytest.mark.parametrize(
    ("words", "says"), REFUSED, ids=lambda value: " ".join(map(str, value))[:70] if isinstance(value, tuple) else ""
)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(
    words: tuple[object, ...],
    says: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(here.iterdir())
    code, out, complaint = command_of(monkeypatch, capsys)(*words)
    assert (code, out) == (status_of(complaint), "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert any(part in complaint for part in says.split("|"))
    assert len(complaint) < 1000 or "xxxx" in complaint
    assert "HasLoaded" not in complaint
    assert "Traceback" not in complaint
    assert sorted(path for path in here.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("words", [PROFILE, RUN, POLICY, FID, CLIP, ("demo",)], ids=lambda words: " ".join(words[:2]))
def test_what_is_right_gets_as_far_as_loading(
    words: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, complaint = command_of(monkeypatch, capsys)(*words)
    assert code == 1
    assert "HasLoaded" in complaint or "the model is loaded" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("command", [PROFILE, RUN])
def test_a_device_that_this_machine_lacks_is_one_line(
    command: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, complaint = command_of(monkeypatch, capsys)(*command, "--device", "cuda")
    assert code == 2
    assert complaint.startswith("error: device='cuda' was given. Allowed: cpu on this machine (")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", torch.float32)]
)
def test_types_have_short_names(name: str, kind: torch.dtype, here: Path) -> None:
    assert _models.named("dit", name, None).dtype == kind


# Errors of others


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "p.safetensors"), "p.safetensors: No space left on device"),
        (RuntimeError("CUDA error:\n  out of memory"), "RuntimeError: CUDA error: out of memory (--debug shows where)"),
        (json.JSONDecodeError("Expecting value", "x", 0), "JSONDecodeError: Expecting value"),
        (ValueError(), "ValueError: no message"),
        (KeyError("sample"), "KeyError: 'sample'"),
        (RuntimeError("x" * 5000), "RuntimeError: xxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_others_are_one_line_with_the_traceback_on_demand(
    error: Exception, line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: CacheSchedule, path: Path) -> Path:
        raise error

    monkeypatch.setattr(CacheSchedule, "save", fail)
    words = ("plan", "profile.safetensors", "--steps", 4)
    command = command_of(monkeypatch, capsys)
    code, _, complaint = command(*words)
    assert code == 1
    assert complaint.startswith(f"error: {line}")
    assert complaint.count("\n") == 1
    assert len(complaint) < 1000
    code, _, complaint = command(*words, "--debug")
    assert code == 1
    assert complaint.startswith("Traceback")
    assert f"error: {line}" in complaint
    monkeypatch.setenv("DIFFCACHE_DEBUG", "1")
    assert command(*words)[2].startswith("Traceback")
    monkeypatch.setenv("DIFFCACHE_DEBUG", "0")
    assert not command(*words)[2].startswith("Traceback")


def test_an_error_in_the_users_own_function_is_one_line_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, complaint = command_of(monkeypatch, capsys)("profile", "mine:pipe", "--steps", 3, "--prompts", "p.txt")
    assert (code, complaint) == (1, "error: LookupError: the model is loaded (--debug shows where)\n")


@pytest.mark.parametrize(("name", "returned"), [("words", "str"), ("nothing", "None"), ("several", "list")])
def test_a_function_that_returns_no_pipeline_is_refused_by_its_name(
    name: str, returned: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"words": "'a'", "nothing": "None", "several": "[1, 2, 3]"}
    (here / "mine.py").write_text(f"def {name}():\n    return {values[name]}\n")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for words in (("profile", f"mine:{name}", "--steps", 3), ("eval", "policy", f"mine:{name}", "full")):
        code, _, complaint = command_of(monkeypatch, capsys)(*words)
        assert code == 2
        assert f"model='mine:{name}' was given" in complaint
        assert complaint.endswith(f"a pipeline and calls; it returned {returned}.\n")


def lines(text: str) -> list[str]:
    """What a terminal would show: a carriage return begins its line anew."""
    return [line.rpartition("\r")[2] for line in text.split("\n")]


def test_nothing_is_printed_on_the_line_of_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*_: Any, **__: Any) -> None:
        with tqdm(total=3, file=sys.stderr) as bar:
            bar.update()
            warnings.warn("a step was computed", diffcache.executor.FailedOpen, stacklevel=1)
            raise DiffCacheError("the run failed")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit):
        cli.main()
    said = lines(capsys.readouterr().err)
    assert "warning: a step was computed" in said
    assert "error: the run failed" in said


def test_an_error_begins_a_line_though_a_bar_was_left_open(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    def command(*_: Any, **__: Any) -> None:
        bars.append(tqdm(total=3, desc="load", file=sys.stderr))  # as in a generator that an error does not close
        raise DiffCacheError("the run failed")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit):
        cli.main()
    said = lines(capsys.readouterr().err)
    assert any(line.startswith("load:") for line in said)
    assert "error: the run failed" in said
    assert bars[0].disable  # closed


def test_options_of_eval_policy_reach_the_evaluation(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def evaluate(pipe: Any, methods: Any, calls: Any, **options: Any) -> None:
        (method,) = methods
        seen.append((pipe, method.name, method.detail, calls, options))
        raise DiffCacheError("seen")

    monkeypatch.setattr("diffcache.eval.evaluation.evaluate", evaluate)
    loaded = _models.Loaded("the policy", calls=[{"seed": 0}])
    monkeypatch.setattr(_models.Named, "load", lambda self: (kinds.append(self.dtype), loaded)[1])
    kinds: list[Any] = []
    words = ("--metrics", "action, state", "--store", "int8", "--profile", "profile.safetensors", "--dtype", "fp16")
    assert command_of(monkeypatch, capsys)(*POLICY, *words)[2] == "error: seen\n"
    assert command_of(monkeypatch, capsys)(*POLICY)[2] == "error: seen\n"
    (pipe, name, detail, calls, options), plain = seen
    assert (pipe, name, calls) == ("the policy", "uniform:every=2", [{"seed": 0}])
    assert "int8" in detail
    assert "int8" not in plain[2]
    assert options["metrics"] == ("action", "state")
    assert options["profile"] == Profile.load("profile.safetensors")
    assert options["title"] == "mine:policy"
    assert (plain[4]["metrics"], plain[4]["profile"]) == (None, None)
    assert kinds == [torch.float16, None]


@pytest.mark.parametrize("verb", ["measure", "evaluate"])
def test_a_run_that_fails_ends_the_line_of_its_bar(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = fresh("flux")
    call = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(0)}

    def fail(*_: Any) -> None:
        raise RuntimeError("the network failed")

    pipe.transformer.register_forward_hook(fail)
    run = {
        "measure": lambda: diffcache.measure(pipe, [call], progress=True),
        "evaluate": lambda: diffcache.evaluate(
            pipe, {}, [call], compare=(), metrics=("latent",), out=tmp_path, progress=True
        ),
    }
    with pytest.raises(RuntimeError, match="the network failed"):
        run[verb]()
    shown = capsys.readouterr().err
    assert verb in shown
    assert shown.endswith("\n")


# Words


def test_a_profile_prints_the_batch_and_the_steps_of_influence(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.csv").write_text("class_labels\n1\n3\n1\n3\n")
    words = ("--steps", 3, "--batch", 4, "--sites", "block", "--influence-steps", 1, "--device", "cpu")
    code, out, _ = command_of(monkeypatch, capsys)("profile", models / "dit", "--prompts", "labels.csv", *words)
    assert code == 0
    assert "batch: 4" in out.splitlines()
    assert Profile.load("profile.safetensors").samples == 4
    (step,) = [line for line in out.splitlines() if "influence" in line]
    assert step.startswith("influence measured at step ")
    assert "influence_steps" not in out


def test_a_loop_without_a_noise_scheduler_is_described_in_words(tmp_path: Path) -> None:
    net = Transformer().eval()

    def sample() -> Tensor:
        x = torch.randn(2, HORIZON, ACTION)
        timesteps = torch.linspace(1, 0, 7)[:-1]
        with torch.no_grad(), diffcache.trajectory(net, timesteps):
            for t in timesteps:
                x = 0.98 * x - 0.1 * net(x, t.expand(2), torch.zeros(1))
        return x

    loop = diffcache.Loop(net, sample)
    calls = [{"seed": n} for n in range(2)]
    schedule = diffcache.optimize(loop, calls, 3, time_limit_s=0)
    found = diffcache.evaluate(loop, {"a": schedule}, calls, compare=(), out=tmp_path / "out", progress=False)
    texts = [str(schedule), str(found), found.report.read_text(), json.dumps(found.record)]
    texts += [str(diffcache.measure(loop, calls)), schedule_of_a_pipeline_on(loop), schedule_on_a_pipeline(schedule)]
    assert "none (the loop steps by itself)" in str(schedule)
    assert not [text for text in texts if "Clock" in text]


def schedule_of_a_pipeline_on(loop: Any) -> str:
    source = bound(loop, hold("#.#.#."))
    other = bound(shared("flux"), hold("#.#.#.")).noise_scheduler
    with pytest.raises(DiffCacheError) as refused:
        diffcache.accelerate(loop, dataclasses.replace(source, noise_scheduler=other))
    return str(refused.value)


def schedule_on_a_pipeline(schedule: Any) -> str:
    pipe = shared("flux")
    fitting = bound(pipe, hold("#.#.#."))
    with pytest.raises(DiffCacheError) as refused:
        diffcache.accelerate(pipe, dataclasses.replace(fitting, noise_scheduler=schedule.noise_scheduler))
    return str(refused.value)
