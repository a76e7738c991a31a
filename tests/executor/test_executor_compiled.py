"""Denoisers that are wrapped or compiled, before acceleration or after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from probes import ours
from small_loop import Loop, Net, ToyAttention, assert_fails_open, loop, noise
from torch import Tensor, nn

from diffcache import accelerated, report
from diffcache.errors import ScheduleMismatch, UnsupportedModel


def test_the_main_input_is_found_under_a_wrapper_that_hides_the_signature() -> None:
    """A wrapper found on the object takes anything; with the input lost, another batch size would go unnoticed."""
    pipe = loop()
    inner = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    assert_fails_open(pipe, "uniform:every=3", "shape, dtype or device of the input changed", failed=2)


def whole(net: nn.Module) -> None:
    net.compile(backend="eager", fullgraph=True)


def blockwise(net: nn.Module) -> None:
    for block in net.blocks:
        block.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("compiled", "spec"),
    [(whole, "uniform:every=2"), (blockwise, "uniform:every=2"), (blockwise, "uniform:every=2,sites=block")],
)
@pytest.mark.parametrize("first", ["compile", "accelerate"])
def test_a_compiled_module_stays_one_graph_and_is_skipped_from_outside(
    compiled: Callable[[nn.Module], None], spec: str, first: str
) -> None:
    plain = CompilableLoop.made()
    with accelerated(plain, spec):
        expected = plain(noise())
    pipe = CompilableLoop.made()
    before = sorted(vars(pipe.transformer))
    torch._dynamo.reset()
    if first == "compile":
        compiled(pipe.transformer)
    with accelerated(pipe, spec):
        if first == "accelerate":
            compiled(pipe.transformer)
        torch._dynamo.utils.counters.clear()
        found = pipe(noise())
        assert sum(row.predicted for row in report(pipe).rows) == 4 * (3 if "block" in spec else 1)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # blocks share theirs
    torch.testing.assert_close(found, expected)
    assert sorted(vars(pipe.transformer)) == sorted({*before, *(["_compiled_call_impl"] if compiled is whole else [])})


class CompilableNet(Net):
    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor]:
        h = hidden_states + prompt
        for block in self.blocks:
            h = block(h, timestep / 1000)
        return (h,)


class CompilableLoop(Loop):
    @classmethod
    def made(cls) -> Loop:
        net = CompilableNet().requires_grad_(False)
        for block in net.blocks:
            block.attn = PureAttention.of(block.attn)
        pipe = Loop(net, FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe


class PureAttention(nn.Module):
    """Without a counter, which would be a new graph at every call."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix = mix

    @classmethod
    def of(cls, other: ToyAttention) -> PureAttention:
        return cls(other.mix)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.mix(hidden_states))


@pytest.mark.parametrize(
    ("compiled", "spec", "says"),
    [
        (whole, "uniform:every=2,sites=block", "'block:blocks.0' of 'transformer' lies inside 'transformer', which is"),
        (whole, "uniform:every=2,sites=stack", "'stack:blocks' of 'transformer' lies inside 'transformer'"),
        (
            blockwise,
            "uniform:every=2,sites=sublayer",
            "'sublayer:blocks.0.attn' of 'transformer' lies inside 'blocks.0'",
        ),
    ],
)
def test_sites_inside_a_compiled_graph_are_refused(compiled: Callable[[nn.Module], None], spec: str, says: str) -> None:
    pipe = loop()
    compiled(pipe.transformer)
    before = sorted(vars(pipe.transformer))
    with pytest.raises(UnsupportedModel, match=says), accelerated(pipe, spec):
        pass
    assert ours(pipe) == []
    assert sorted(vars(pipe.transformer)) == before


def test_a_denoiser_wrapped_by_the_compiler_after_acceleration_is_refused_with_the_way_out() -> None:
    pipe = loop()
    with accelerated(pipe, "uniform:every=2"):
        mine = pipe.transformer
        pipe.transformer = torch.compile(mine, backend="eager")
        with pytest.raises(ScheduleMismatch, match=r"\(now: OptimizedModule\).*compile first, accelerate last"):
            pipe(noise())
        pipe.transformer = mine
        pipe(noise())
    assert ours(pipe) == []
