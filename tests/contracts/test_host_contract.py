"""The contract of hosts: every file in ``host/kinds`` keeps it, and a kind of another package needs no edit."""

from __future__ import annotations

import ast
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import decoders
import masked_language_model as foreign
import pipelines
import policies
import pytest
import torch
from pipelines import modular
from torch import Tensor, nn

import diffcache
from diffcache import host, registry
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.eval import metrics
from diffcache.host import kinds

PACKAGE = Path(diffcache.__file__).parent
HOSTS = {"Loop", "PolicyLoop", "RegisteredLoop", "Clock"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) * (1 + timestep)


def integrated(network: Any, steps: int) -> Tensor:
    times = torch.linspace(1, 0, steps + 1)
    x = torch.randn(1, 4, 2)
    with torch.no_grad(), diffcache.trajectory(network, times[:-1]):
        for t, after in itertools.pairwise(times):
            x = x + (after - t) * network(x, t.expand(1))
    return x


def own_loop() -> diffcache.Loop:
    network = Net()
    return diffcache.Loop(network, lambda: integrated(network, 6))


def text_loop() -> diffcache.Loop:
    network = decoders.decoder()

    def sample(prompt: Tensor) -> Tensor:
        with diffcache.trajectory(network, range(8)):
            return decoders.decode(network, prompt, answer=8)[0]

    return diffcache.Loop(network, sample)


class Example(NamedTuple):
    """A host of a kind, a call of it, the steps that the call takes, and a rule that skips work in it."""

    build: Callable[[], Any]
    call: Callable[[Any], dict[str, Any]]
    steps: int
    rule: str = "uniform:every=2"


def of_pipeline(name: str) -> Example:
    tiny = pipelines.ALL[name]
    return Example(lambda: pipelines.fresh(name), tiny.call, tiny.call(pipelines.shared(name))["num_inference_steps"])


def of_modular(name: str) -> Example:
    one = modular.MODULAR[name]

    def call(pipe: Any) -> dict[str, Any]:
        return {**one.call(pipe), "generator": torch.Generator().manual_seed(0), "output": "latents"}

    return Example(one.build, call, call(modular.shared(name))["num_inference_steps"])


def policy_example() -> Example:
    case = policies.CASES["diffusion_policy"]
    return Example(lambda: host.adopted(case.make()), lambda _: {**case.call(), "seed": 0}, case.steps)


# Kind -> an example. A file without one fails the test below: add yours here.
EXAMPLES: dict[str, Callable[[], Example]] = {
    "pipeline": lambda: of_pipeline("flux"),
    "modular": lambda: of_modular("flux"),
    "own_loop": lambda: Example(own_loop, lambda _: {"seed": 0}, 6),
    "policy": policy_example,
    "language_model": lambda: Example(text_loop, lambda _: {"prompt": decoders.prompts()}, 8, "dkv:refresh=4"),
}


def masked() -> Example:
    prompt = torch.tensor([[3, 4, 5], [1, 2, 9]])
    return Example(lambda: foreign.Decoder(foreign.LanguageModel().eval()), lambda _: {"prompt": prompt, "steps": 8}, 8)


CASES = [pytest.param(made, id=name) for name, made in (EXAMPLES | {"of another package": masked}).items()]


class Events(host.LoopObserver):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.steps: list[int] = []

    def loop_began(self, run: host.LoopRun) -> None:
        self.seen.append("began")

    def loop_ended(self, run: host.LoopRun) -> None:
        self.seen.append("ended")
        self.steps.append(run.steps)

    def missed(self, kind: str, why: str) -> None:
        self.seen.append(kind)


def attributes(pipe: Any) -> dict[str, dict[str, Any]]:
    """The attributes of a host and of its networks, those that torch adds at a first run left out."""
    found = {"host": dict(vars(pipe))}
    return found | {name: dict(vars(module)) for name, module in host.denoisers(pipe).items()}


def test_every_kind_has_an_example() -> None:
    assert EXAMPLES.keys() == set(registry.names(kinds.__name__))


@pytest.mark.parametrize("made", CASES)
def test_a_host_is_recognised_by_one_kind(made: Callable[[], Example]) -> None:
    pipe = made().build()
    found = [kind for kind in kinds.kinds() if kind.recognises(pipe)]
    assert len([kind for kind in found if not kind.fallback]) <= 1
    assert found[:1] == ([] if isinstance(pipe, foreign.Decoder) else [host.kind_of(pipe)])
    assert host.adopted(pipe) is pipe


@pytest.mark.parametrize("made", CASES)
def test_a_kind_answers_for_its_host(made: Callable[[], Example]) -> None:
    example = made()
    pipe = example.build()
    kind, call = host.kind_of(pipe), example.call(pipe)
    assert kind.allowed
    assert kind.example.startswith("calls = ")
    assert all(isinstance(network, nn.Module) or host.main_input(network) for network in kind.denoisers(pipe).values())
    names = kind.arguments(pipe)
    assert names is None or call.keys() <= names.keys()
    host.check_calls(pipe, [call])
    assert kind.steps_asked(pipe, call) in (None, example.steps)
    assert set(kind.traits.metrics) <= set(metrics.available())
    assert kind.parts(pipe)
    assert hasattr(kind.noise_scheduler(pipe), "step")
    assert host.guidance_scales(pipe).keys() <= host.guidance_values(pipe).keys()


@pytest.mark.parametrize("made", CASES)
def test_a_watcher_sees_one_loop_for_each_call_and_leaves_no_trace(made: Callable[[], Example]) -> None:
    example = made()
    pipe = example.build()
    pipe(**example.call(pipe))  # a first run may leave attributes
    before = attributes(pipe)
    events = Events()
    watcher = host.LoopWatcher(pipe, events)
    watcher.attach()
    try:
        for _ in range(2):
            with torch.no_grad():
                pipe(**example.call(pipe))
            assert watcher.run is None
    finally:
        watcher.detach()
    assert events.seen == ["began", "ended"] * 2
    assert events.steps == [host.iterations(pipe, example.call(pipe)) or example.steps] * 2
    after = attributes(pipe)
    assert {name: set(found) for name, found in after.items()} == {name: set(found) for name, found in before.items()}
    events.seen.clear()
    pipe(**example.call(pipe))
    assert events.seen == []


@pytest.mark.parametrize("made", CASES)
def test_an_exception_ends_the_loop(made: Callable[[], Example]) -> None:
    example = made()
    pipe = example.build()
    events = Events()
    watcher = host.LoopWatcher(pipe, events)
    (name, network), *_ = host.denoisers(pipe).items()

    class StopError(Exception):
        pass

    def stop(inner: Any, *args: Any, **kwargs: Any) -> Any:
        watcher.entered()
        raise StopError

    undo = diffcache.patch.layer(*diffcache.patch.inner_spot(network), stop)
    watcher.attach()
    try:
        with pytest.raises(StopError):
            pipe(**example.call(pipe))
        if watcher.run is not None:  # a modular pipeline or one without a ``with`` block: the next call closes it
            watcher.close()
    finally:
        undo()
        watcher.detach()
    assert events.seen == ["began", "ended"], name


@pytest.mark.parametrize("made", CASES)
def test_full_computes_every_bit_and_a_rule_skips(made: Callable[[], Example]) -> None:
    example = made()
    pipe = example.build()

    def run() -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = pipe(**example.call(pipe))
        return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]

    plain = run()
    with diffcache.accelerated(pipe, "full"):
        assert all(map(torch.equal, run(), plain))
    with diffcache.accelerated(pipe, example.rule):
        run()
        found = diffcache.report(pipe)
    assert 0 < found.skipped < 1
    assert all(map(torch.equal, run(), plain))


@pytest.mark.parametrize("made", CASES)
def test_a_watcher_does_not_keep_its_host_alive(made: Callable[[], Example]) -> None:
    pipe = made().build()
    gone = weakref.ref(pipe)
    watcher = host.LoopWatcher(pipe, Events())
    del pipe
    gc.collect()
    assert gone() is None
    assert watcher.pipe is None


def test_a_kind_of_another_package_is_measured_estimated_evaluated_and_optimized(tmp_path: Path) -> None:
    """One class attribute, ``DIFFCACHE_KIND``, and no edit: a masked language model."""
    example = masked()
    decoder = example.build()
    calls = [example.call(decoder)] * 4
    assert diffcache.estimate(decoder, "uniform:every=2", **calls[0]).compute_fraction == pytest.approx(0.5)
    profile = diffcache.measure(decoder, calls[:2])
    assert profile.provenance["no_dynamics"].startswith("the state is not a floating-point tensor")
    schedule = diffcache.optimize(decoder, calls, 4)
    found = diffcache.evaluate(decoder, {"ours": schedule}, calls[:2], out=tmp_path)
    assert list(found.record["metrics"]) == ["state"]
    kinds_compared = [method["kind"] for method in found.record["methods"]]
    assert kinds_compared == ["full", "ours", "fewer steps", "reuse"]
    assert [m["computed_steps"] for m in found.record["methods"]][2] in (4, 4.0)
    with diffcache.accelerated(decoder, schedule):
        decoder(**calls[0])
        assert "4 computed in full, 4 predicted" in str(diffcache.report(decoder))


def test_an_object_that_is_not_a_kind_is_refused_by_name() -> None:
    class Wrong:
        DIFFCACHE_KIND = "masked"

    with pytest.raises(UnsupportedModel, match=r"Wrong.DIFFCACHE_KIND is a str. Allowed: an instance of a subclass"):
        diffcache.accelerate(Wrong(), "full")


def test_a_host_that_cannot_be_called_is_refused_before_it_runs() -> None:
    class Silent:
        DIFFCACHE_KIND = foreign.Masked()
        generate = foreign.Decoder.generate
        model, length = foreign.LanguageModel().eval(), 8

    decoder = Silent()
    with pytest.raises(BadOption, match=r"define __call__"):
        diffcache.measure(decoder, [masked().call(decoder)])


class Barred(diffcache.Loop):
    """A loop with a method of the name that pipelines use."""

    def progress_bar(self, iterable: Any) -> Any:
        return iterable


class Forwarded:
    """A wrapper of a pipeline that forwards every attribute."""

    def __init__(self, pipe: Any) -> None:
        self.wrapped = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def test_a_loop_with_a_progress_bar_is_a_loop() -> None:
    network = Net()
    loop = Barred(network, lambda: integrated(network, 6))
    with diffcache.accelerated(loop, "uniform:every=2"):
        loop(seed=0)
        assert "3 computed in full, 3 predicted" in str(diffcache.report(loop))


def test_a_wrapper_that_forwards_attributes_is_a_pipeline() -> None:
    assert host.kind_of(Forwarded(pipelines.shared("flux"))) is host.kind_of(pipelines.shared("flux"))


class Failing(host.LoopWatch):
    def attach(self) -> Iterator[Callable[[], None]]:
        yield lambda: None

    def opened(self, run: host.LoopRun) -> Iterator[Callable[[], None]]:
        yield diffcache.patch.layer(run.scheduler, "step", self.watcher.step, copies=True)
        raise RuntimeError("no second wrapper")


def test_a_loop_that_cannot_be_watched_is_ended_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.fresh("flux")
    monkeypatch.setattr(type(host.kind_of(pipe)), "watch", lambda self, watcher: Failing(watcher))
    events = Events()
    watcher = host.LoopWatcher(pipe, events)
    pipe.scheduler.set_timesteps(4, mu=1.0)
    with pytest.raises(RuntimeError, match="no second wrapper"):
        watcher.open(pipe.scheduler, 0)
    assert events.seen == ["began", "ended"]
    assert "step" not in vars(pipe.scheduler)
    assert watcher.run is None


def test_an_object_of_no_kind_is_refused_with_all_that_is_allowed() -> None:
    with pytest.raises(UnsupportedModel) as found:
        diffcache.accelerate(object(), "full")
    assert all(kind.allowed in str(found.value) for kind in kinds.kinds())


def asked_for_a_class(source: str) -> list[str]:
    """Return the classes of hosts that ``isinstance`` is called with."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    ]
    named = (part for call in calls for part in ast.walk(call.args[1]))
    return [name for part in named if (name := getattr(part, "attr", getattr(part, "id", ""))) in HOSTS]


def test_no_class_of_a_host_is_asked_for_outside_of_its_folder() -> None:
    for path in PACKAGE.rglob("*.py"):
        if not path.is_relative_to(PACKAGE / "host"):
            assert not asked_for_a_class(path.read_text(encoding="utf-8")), path


def test_asking_for_a_class_would_be_seen() -> None:
    assert asked_for_a_class("isinstance(pipe, host.PolicyLoop)") == ["PolicyLoop"]
    assert asked_for_a_class("isinstance(pipe, (Loop, str))") == ["Loop"]
