"""Facts about kinds of hosts: evaluation and recording ask for them, and never for a class."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import shared
from torch import Tensor, nn

import diffcache
from diffcache import host
from diffcache.eval import metrics
from diffcache.eval.methods import baselines
from diffcache.eval.runner import steps_of
from diffcache.host.traits import LOOP, POLICY

pytestmark = pytest.mark.fast

PACKAGE = Path(diffcache.__file__).parent
HOSTS = {"Loop", "PolicyLoop", "Standing", "Clock"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) * (1 + timestep)


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
        if path.parent != PACKAGE / "host":
            assert not asked_for_a_class(path.read_text(encoding="utf-8")), path


def test_asking_for_a_class_would_be_seen() -> None:
    assert asked_for_a_class("isinstance(pipe, host.PolicyLoop)") == ["PolicyLoop"]
    assert asked_for_a_class("isinstance(pipe, (Loop, str))") == ["Loop"]


def test_each_kind_of_host_has_its_traits() -> None:
    assert host.traits(shared("flux")) is host.PIPELINE
    assert host.traits(diffcache.Loop(Net(), lambda: None)) is LOOP
    assert host.PolicyLoop.TRAITS is POLICY
    assert host.traits(object()) is host.PIPELINE


@pytest.mark.parametrize("traits", [host.PIPELINE, LOOP, POLICY])
def test_default_metrics_exist(traits: host.Traits) -> None:
    assert set(traits.metrics) <= set(metrics.available())


def test_a_new_kind_of_host_needs_its_traits_and_no_edit(tmp_path: Path) -> None:
    """A loop whose call says its number of steps, and which can step another noise scheduler."""

    class Asked(diffcache.Loop):
        TRAITS = host.Traits(returns="state", metrics=("latent",), swaps_scheduler=False, writes_arguments=True)

    network = Net()

    def sample(num_inference_steps: int = 6) -> Tensor:
        return integrated(network, num_inference_steps)

    loop, plain = Asked(network, sample), diffcache.Loop(network, sample)
    calls = [{"seed": n, "num_inference_steps": 6} for n in range(2)]
    found = diffcache.evaluate(loop, {"a": "uniform:every=2"}, calls, compare=(), out=tmp_path / "asked")
    assert steps_of(loop, calls[0]) == 6
    assert list(found.record["metrics"]) == ["latent"]
    usual = diffcache.evaluate(plain, {"a": "uniform:every=2"}, calls, compare=(), out=tmp_path / "plain")
    assert list(usual.record["metrics"]) == ["latent", "state"]
    assert [one.kind for one in baselines(loop, 6, [3])] == ["fewer steps", "reuse"]


def integrated(network: Any, steps: int) -> Tensor:
    times = torch.linspace(1, 0, steps + 1)
    x = torch.randn(1, 4, 2)
    with torch.no_grad(), diffcache.trajectory(network, times[:-1]):
        for t, after in itertools.pairwise(times):
            x = x + (after - t) * network(x, t.expand(1))
    return x
