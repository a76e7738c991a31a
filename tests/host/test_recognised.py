"""What a result depends on is in the digest under which it is kept: one thing changed, another digest."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from pipelines import TINY, fresh, run, shared
from small_loop import Net
from torch import Tensor, nn

import diffcache
from diffcache import evaluate, host, measure
from diffcache.errors import BadOption
from diffcache.eval import Method, Trials, fewer_steps, ours
from diffcache.eval.extractors import custom
from diffcache.eval.metrics import class_accuracy, scorer
from diffcache.eval.runner import Judges
from diffcache.eval.saved_parts import EvaluationFolder
from diffcache.host.digest import NoDigestError
from diffcache.host.tensor_hash import BLOCK, tensor_hash

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = [str(HERE), str(ROOT / "tests" / "helpers"), str(ROOT)]


def refuse(name: str, reason: NoDigestError) -> str:
    raise reason


def key(pipe: Any) -> dict[str, str]:
    return host.identity(host.adopted(pipe), refuse)


def changed(pipe: Any, change: Callable[[Any], Any]) -> set[str]:
    """Return the names of the parts whose digests a change alters; the digests are the same when asked for twice."""
    before = key(pipe)
    assert key(pipe) == before
    change(pipe)
    after = key(pipe)
    return {name for name in before | after if before.get(name) != after.get(name)}


# Tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("length", [1, 3, 4 * BLOCK + 5])
def test_every_element_of_a_tensor_counts_and_so_does_its_place(dtype: torch.dtype, length: int) -> None:
    one = (torch.arange(length) % 2).to(dtype)
    was = tensor_hash(one)
    assert tensor_hash(one.clone()) == was
    for index in {0, length // 2, length - 1}:
        other = one.clone()
        other[index] = 1 - one[index].int()
        assert tensor_hash(other) != was
    if length > 1:
        assert tensor_hash(one.roll(1)) != was


def test_the_hash_depends_on_elements_and_not_on_memory_layout() -> None:
    one = torch.randn(37, 2 * BLOCK + 3)
    assert tensor_hash(one.t().contiguous().t()) == tensor_hash(one)
    shifted = torch.randn(2 * BLOCK + 1).to(torch.bfloat16)[1:]
    assert tensor_hash(shifted) == tensor_hash(shifted.clone())


def test_changes_that_cancel_each_other_in_a_sum_are_seen() -> None:
    one = torch.randn(4 * BLOCK)
    swapped, negated = one.clone(), one.clone()
    swapped[[5, BLOCK + 9]] = one[[BLOCK + 9, 5]]
    negated[[5, 9]] *= -1
    assert len({tensor_hash(t) for t in (one, swapped, negated)}) == 3


# Pipelines.


def with_adapter() -> Any:
    """A Flux pipeline with a LoRA that has a say in the result."""
    pipe = fresh("flux")
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="style")
    return pipe


def layered(pipe: Any) -> None:
    inner, strength = pipe.transformer.forward, 0.5
    pipe.transformer.forward = lambda *args, **kwargs: [strength * x for x in inner(*args, **kwargs)]


class Louder:
    """An attention processor with a parameter."""

    def __init__(self, inner: Any, volume: float) -> None:
        self.inner, self.volume = inner, volume

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def one_weight(pipe: Any) -> None:
    """An element that a sample of a few would miss, written past the version counter."""
    weight = max(pipe.transformer.parameters(), key=Tensor.numel)
    weight.data.view(-1)[weight.numel() // 2 + 1] += 1e-3


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "one element of a weight": ("transformer", one_weight),
    "dtype": ("transformer", lambda p: p.transformer.to(torch.float64)),
    "buffer": ("transformer", lambda p: p.transformer.register_buffer("extra", torch.ones(1))),
    "training mode": ("transformer", lambda p: p.transformer.train()),
    "forward hook": ("transformer", lambda p: p.transformer.register_forward_hook(lambda m, a, out: out)),
    "pre-hook": ("transformer", lambda p: p.transformer.proj_out.register_forward_pre_hook(lambda m, a: a)),
    "replaced forward": ("transformer", layered),
    "attention processor": (
        "transformer",
        lambda p: p.transformer.set_attn_processor(Louder(next(iter(p.transformer.attn_processors.values())), 2.0)),
    ),
    "attribute of a module": ("transformer", lambda p: setattr(p.transformer.transformer_blocks[0].attn, "heads", 7)),
    "compiled": ("transformer", lambda p: p.transformer.compile()),
    "vae": ("vae", lambda p: next(p.vae.parameters()).data.mul_(1.5)),
    "vae tiling": ("vae", lambda p: p.vae.enable_tiling()),
    "vae's scale": ("vae", lambda p: p.vae.register_to_config(scaling_factor=0.5)),
    "image processor": ("pipeline", lambda p: p.image_processor.register_to_config(do_normalize=False)),
    "method of the pipeline": ("pipeline", lambda p: setattr(p, "_unpack_latents", lambda x, *_: x)),
    "noise scheduler's configuration": ("scheduler", lambda p: p.scheduler.register_to_config(shift=9.0)),
    "noise scheduler's state": ("scheduler", lambda p: p.scheduler.set_shift(9.0)),
    "noise scheduler's step": (
        "scheduler",
        lambda p: setattr(p.scheduler, "step", functools.partial(at_the_top, p)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_pipeline_changes_its_part_of_the_identity(name: str) -> None:
    part, change = CHANGES[name]
    assert changed(fresh("flux"), change) == {part}


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda p: p.transformer.set_adapters(["style"], [0.1]),
    "scale of one layer": lambda p: p.transformer.transformer_blocks[0].attn.to_q.set_scale("style", 0.3),
    "disabled": lambda p: p.transformer.disable_adapters(),
    "fused": lambda p: p.transformer.fuse_lora(),
    "weights": lambda p: p.transformer.transformer_blocks[0].attn.to_q.lora_B["style"].weight.data.mul_(2),
    "removed": lambda p: p.transformer.delete_adapters("style"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_change_of_an_adapter_changes_the_identity(name: str) -> None:
    assert changed(with_adapter(), ADAPTERS[name]) == {"transformer"}


def precision(_: Any) -> None:
    torch.set_float32_matmul_precision("medium")


def attention(_: Any) -> None:
    torch.backends.cuda.enable_flash_sdp(False)


@pytest.mark.parametrize("change", [precision, attention, lambda _: torch.use_deterministic_algorithms(True)])
def test_a_setting_of_torch_changes_the_identity(change: Callable[[Any], None]) -> None:
    was = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    try:
        assert changed(shared("flux"), change) == {"torch settings"}
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cuda.enable_flash_sdp(was[1])
        torch.use_deterministic_algorithms(False)
    before = key(shared("flux"))
    with torch.autocast("cpu", torch.bfloat16):
        assert key(shared("flux")) != before


@pytest.mark.parametrize("name", ["flux", "wan", "sdxl", "dit", "stable_audio", "z_image"])
def test_a_run_leaves_the_identity_as_it_was_and_a_copy_has_it_too(name: str) -> None:
    pipe = fresh(name)
    before = key(pipe)
    run(pipe, TINY[name].call(pipe))
    assert key(pipe) == before
    assert key(fresh(name)) == before


OTHER_PROCESS = """
import sys
sys.path[:0] = {paths!r}
from test_recognised import key, with_adapter
pipe = with_adapter()
pipe.transformer.register_forward_hook(print)
print("\\n".join(sorted(f"{{name}} {{digest}}" for name, digest in key(pipe).items())))
"""


def test_another_process_finds_the_same_identity() -> None:
    pipe = with_adapter()
    pipe.transformer.register_forward_hook(lambda *_: None).remove()  # hooks are numbered through the process
    pipe.transformer.register_forward_hook(print)
    script = OTHER_PROCESS.format(paths=PATHS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == sorted(f"{name} {digest}" for name, digest in key(pipe).items())


def test_a_reloaded_pipeline_has_the_identity_of_the_saved_one(tmp_path: Path) -> None:
    pipe = fresh("dit")
    pipe.save_pretrained(tmp_path / "one")
    pipe.save_pretrained(tmp_path / "other")
    one, other = (type(pipe).from_pretrained(tmp_path / name) for name in ("one", "other"))
    assert key(one) == key(other)


def test_offloaded_weights_are_hashed_where_they_lie() -> None:
    from accelerate import cpu_offload

    def offloaded() -> Any:
        pipe = fresh("dit")
        cpu_offload(pipe.transformer, torch.device("cpu"))
        return pipe

    one, other = offloaded(), offloaded()
    assert next(one.transformer.parameters()).is_meta
    assert key(one) == key(other)
    block = other.transformer.transformer_blocks[0].ff.net[2]
    block._hf_hook.weights_map["weight"].mul_(1.01)
    assert {name for name in key(one) if key(one)[name] != key(other)[name]} == {"transformer"}


def test_weights_that_are_nowhere_to_be_read_are_refused_with_the_reason(tmp_path: Path) -> None:
    pipe = fresh("dit")
    pipe.transformer.proj_out_2.to("meta")
    with pytest.raises(BadOption, match=r"transformer of the pipeline has a tensor .* \(device meta\).*proj_out_2"):
        measure(pipe, [TINY["dit"].call(pipe)], resume=tmp_path)


# Loops and policies.


def loop_of(net: nn.Module, strength: float, helper: Callable[[Tensor], Tensor] = torch.tanh) -> diffcache.Loop:
    def sample(num_inference_steps: int = 4) -> Tensor:
        x = torch.randn(2, 5, 3)
        with torch.no_grad(), diffcache.trajectory(net, torch.linspace(1, 0, num_inference_steps)):
            for t in torch.linspace(1, 0, num_inference_steps):
                x = x - strength * helper(net(x, t, torch.zeros(1))[0])
        return x

    return diffcache.Loop(net, sample)


def test_the_function_of_a_loop_counts_with_what_it_captures() -> None:
    net = Net()
    assert key(loop_of(net, 0.1)) == key(loop_of(net, 0.1)) == key(loop_of(Net(), 0.1))
    for other in (loop_of(net, 0.2), loop_of(net, 0.1, torch.sin), loop_of(net, 0.1, lambda x: 2 * x)):
        assert key(other) != key(loop_of(net, 0.1))


def module(name: str, text: str) -> Any:
    """A module of the user's, made of this text."""
    found = type(sys)(name)
    sys.modules[name] = found
    exec(compile(text, f"{name}.py", "exec"), vars(found))
    return found


TEXT = "STRENGTH = 1.0\ndef helper(x):\n    return x * STRENGTH\ndef step(x):\n    return helper(x)\n"


@pytest.mark.parametrize("other", [TEXT.replace("1.0", "2.0"), TEXT.replace("x * STRENGTH", "x + STRENGTH")])
def test_globals_and_helpers_of_a_function_count(other: str) -> None:
    found = [host.digest_of(module("theirs", text).step) for text in (TEXT, TEXT, other)]
    assert found[0] == found[1] != found[2]


def test_the_normaliser_of_a_policy_counts() -> None:
    from policies import diffusion_policy

    policy = diffusion_policy()
    policy.statistics = SimpleNamespace(scale=np.ones(3))  # one that is not a module
    assert changed(policy, lambda p: setattr(p.statistics, "scale", np.full(3, 2.0))) == {"policy"}
    assert changed(policy, lambda p: next(p.normalizer.buffers()).add_(1)) == {"policy"}


# Calls.


def at_the_top(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs


def strength(value: float) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * value}

    return callback


UNSTABLE = {
    "defined inside": strength(0.9),
    "lambda": lambda *_: {},
    "functools.partial": functools.partial(at_the_top, 1),
    "bound method": Louder(None, 1.0).__call__,
    "argument of type Louder": Louder(None, 1.0),
    "object of type _thread.lock": threading.Lock(),
}


@pytest.mark.parametrize("says", UNSTABLE)
@pytest.mark.parametrize("verb", ["evaluate", "measure"])
def test_functions_that_cannot_be_recognised_are_refused_before_anything_runs(
    verb: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fresh("flux")
    monkeypatch.setattr(pipe.transformer, "forward", None)  # no run would survive
    call = TINY["flux"].call(pipe) | {"generator": torch.Generator(), "callback_on_step_end": UNSTABLE[says]}
    run_it = functools.partial(evaluate, pipe, {}, [call], metrics=("latent",), out=tmp_path, progress=False)
    with pytest.raises(BadOption, match=rf"{says}.*callback_on_step_end.*Move a function to the top level"):
        run_it() if verb == "evaluate" else measure(pipe, [call], resume=tmp_path)


def test_functions_at_the_top_and_those_that_declare_a_digest_are_accepted() -> None:
    assert host.digest_of_call({"f": at_the_top}) == host.digest_of_call({"f": at_the_top})
    assert host.digest_of_call({"f": at_the_top}) != host.digest_of_call({"f": layered})
    found = []
    for value, told in ((0.1, "0.1"), (0.1, "0.1"), (0.9, "0.9")):
        callback = strength(value)
        callback.digest = told  # type: ignore[attr-defined]
        found.append(host.digest_of_call({"f": callback}))
    assert found[0] == found[1] != found[2]


# Methods, judges, trials, extractors.


class Switch:
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold


def peer(switch: Any, detail: str = "") -> Method:
    return Method(name="peer", kind="peer", on=lambda pipe: switch, detail=detail)


def test_what_a_peer_is_set_to_counts() -> None:
    assert peer(Switch(0.1)).digest == peer(Switch(0.1)).digest != peer(Switch(0.2)).digest
    assert peer(Switch(0.1), "a").digest != peer(Switch(0.1), "b").digest
    with pytest.raises(BadOption, match=r"detail=''.*the method 'peer' has .*lock.*names all settings"):
        _ = peer(threading.Lock()).digest
    assert peer(threading.Lock(), "0.1").digest == peer(threading.Lock(), "0.1").digest
    assert peer(threading.Lock(), "0.1").digest != peer(threading.Lock(), "0.2").digest


def test_schedules_rules_and_noise_schedulers_count() -> None:
    pipe = shared("flux")
    assert ours("a", "uniform:every=2").digest == ours("a", "uniform:every=2").digest
    assert ours("a", "uniform:every=2").digest != ours("a", "uniform:every=3").digest
    assert ours("a", "uniform:every=2").digest != ours("a", "uniform:every=2", store="bf16").digest
    twin = copy.deepcopy(pipe.scheduler)
    same, other = (fewer_steps(pipe, 2, solver=("mine", s)) for s in (twin, copy.deepcopy(twin)))
    assert same.digest == other.digest
    twin.register_to_config(shift=7.0)
    assert fewer_steps(pipe, 2, solver=("mine", twin)).digest != other.digest


def judges(judge: Callable[..., Any]) -> str:
    return Judges({}, {}, {"taste": scorer(judge, name="taste")}).digest


def brightness(factor: float) -> Callable[..., Any]:
    return lambda pictures, prompts: pictures.mean(axis=(1, 2, 3)) * factor


def test_the_code_of_a_scorer_counts_and_its_weights_and_options() -> None:
    assert judges(brightness(1.0)) == judges(brightness(1.0)) != judges(brightness(2.0))
    assert judges(lambda pictures, prompts: pictures[:, 0, 0, 0]) != judges(brightness(1.0))
    nets = [nn.Linear(3, 2) for _ in range(2)]
    found = [Judges({}, {}, {"c": class_accuracy(net)}).digest for net in (*nets, nets[0])]
    assert found[0] == found[2] != found[1]
    with pytest.raises(BadOption, match=r"scorers cannot be used: .*taste.*lock"):
        judges(functools.partial(brightness(1.0), threading.Lock()))


def test_a_file_that_a_metric_is_given_counts_by_its_content(tmp_path: Path) -> None:
    from diffcache.eval import metrics

    path = tmp_path / "weights.pth"
    found = []
    for content in (b"one", b"one", b"two"):
        path.write_bytes(content)
        found.append(Judges({"lpips": functools.partial(metrics.score, "lpips", weights=path)}, {}, {}).digest)
    assert found[0] == found[1] != found[2]


def test_the_code_of_a_task_counts() -> None:
    def playing(skill: float) -> Callable[..., Any]:
        return lambda policy, episodes: [skill > 0.5] * episodes

    assert Trials(playing(0.1), 4, "push").digest == Trials(playing(0.1), 4, "push").digest
    for other in (Trials(playing(0.9), 4, "push"), Trials(playing(0.1), 5, "push"), Trials(playing(0.1), 4, "pull")):
        assert other.digest != Trials(playing(0.1), 4, "push").digest
    with pytest.raises(BadOption, match=r"name=''.*a name for the task"):
        _ = Trials(functools.partial(playing, threading.Lock()), 4).digest


def test_an_extractor_is_more_than_its_name_and_weights() -> None:
    def features(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x.flatten(1)[:, :4] * scale

    assert custom(features(1.0), name="mine").digest == custom(features(1.0), name="mine").digest
    assert custom(features(1.0), name="mine").digest != custom(features(2.0), name="mine").digest
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    was = custom(net, name="net").digest
    net.register_forward_hook(lambda m, a, out: 2 * out)
    assert custom(net, name="net").digest != was


# Twice in one folder.


def twice(pipe: Any, change: Callable[[Any], Any], tmp_path: Path) -> None:
    """Evaluate, change the pipeline, evaluate in the same folder: the result is that of a new folder."""

    def errors(out: Path) -> Any:
        call = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(3)}
        found = evaluate(
            pipe, {"a": "uniform:every=3"}, [call], metrics=("latent",), compare=(), out=out, progress=False
        )
        return found.record["methods"][1]["scores"]["latent"]["values"]

    first = errors(tmp_path / "one")
    change(pipe)
    second = errors(tmp_path / "one")
    assert second == errors(tmp_path / "new")
    assert second != first


def test_a_lora_of_another_scale_is_evaluated_anew(tmp_path: Path) -> None:
    twice(with_adapter(), lambda p: p.transformer.set_adapters(["style"], [0.1]), tmp_path)


def test_a_pipeline_with_a_new_hook_is_evaluated_anew(tmp_path: Path) -> None:
    def add(pipe: Any) -> None:
        pipe.transformer.register_forward_hook(lambda m, a, out: (out[0] * 0.5,) if isinstance(out, tuple) else out)

    twice(fresh("flux"), add, tmp_path)


def test_a_measurement_of_a_changed_pipeline_is_refused(tmp_path: Path) -> None:
    pipe = with_adapter()
    call = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(3)}
    measure(pipe, [call], resume=tmp_path)
    pipe.transformer.set_adapters(["style"], [0.1])
    with pytest.raises(BadOption, match="with transformer weights, hooks and settings"):
        measure(pipe, [call], resume=tmp_path)
    pipe.transformer.set_adapters(["style"], [1.0])
    measure(pipe, [call], resume=tmp_path)
    pipe.transformer.register_forward_hook(lambda m, a, out: out)
    with pytest.raises(BadOption, match="with transformer weights, hooks and settings"):
        measure(pipe, [call], resume=tmp_path)


def test_what_cannot_be_recognised_is_run_again_and_said(tmp_path: Path) -> None:
    pipe = fresh("flux")
    pipe.transformer.engine = threading.Lock()
    call = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(3)}
    options: dict[str, Any] = {"metrics": ("latent",), "compare": (), "out": tmp_path, "progress": False}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"its transformer has an object of type _thread.lock at .*engine"):
            evaluate(pipe, {}, [call], **options)
    ran = []
    pipe.transformer.register_forward_hook(lambda *_: ran.append(1))
    with pytest.warns(UserWarning, match="cannot recognise"):
        evaluate(pipe, {}, [call], **options)
    assert ran


def test_a_folder_belongs_to_one_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"metrics": ("latent",), "compare": (), "progress": False}
    pipes = {name: shared(name) for name in ("flux", "dit")}
    calls = {name: [TINY[name].call(pipe) | {"generator": torch.Generator()}] for name, pipe in pipes.items()}
    record = evaluate(pipes["flux"], {}, calls["flux"], **options).folder / "record.json"
    before = record.read_bytes()
    with pytest.raises(
        BadOption, match=r"out cannot be used: .*evaluation holds the evaluation of another pipeline.*FluxPipeline"
    ):
        evaluate(pipes["dit"], {}, calls["dit"], **options)
    assert record.read_bytes() == before


def test_a_folder_goes_with_a_pipeline_that_was_moved(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    folder.claim({"class": "A", "model": "here"}, "known")
    folder.claim({"class": "A", "model": "there"}, "known")
    folder.claim({"class": "A", "model": "there"}, "with other settings")
    with pytest.raises(BadOption, match="another pipeline"):
        folder.claim({"class": "A", "model": "elsewhere"}, "again others")
