"""Inner sites are measured as they are defined: every table and cost against plain hooks on separate runs."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import BATCH, calls, final_states
from measured import check_tables
from pipelines import TINY, fresh, shared
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffcache
from diffcache import measure
from diffcache.documents import Profile, SiteProfile
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.host import find_sites
from diffcache.patch import Layers, layer
from diffcache.profiling.measuring.influence import MOST_RUNS, steps_to_measure
from diffcache.profiling.recording import granularities, measured_sites, observe
from diffcache.profiling.recording import record as recording
from diffcache.profiling.recording.measured_sites import few, main_output

EVERYTHING = "stack,block,sublayer"

# Blocks that return the text's stream before the one they are given first.
TEXT_FIRST = ("flux", "chroma", "sd3")
# What the first block of each stack does first.
FIRST_NORM = {
    "flux": {"transformer_blocks": "norm1", "single_transformer_blocks": "norm"},
    "chroma": {"transformer_blocks": "norm1", "single_transformer_blocks": "norm"},
    "hunyuan_video": {"transformer_blocks": "norm1", "single_transformer_blocks": "norm"},
    "sd3": {"transformer_blocks": "norm1"},
    "dit": {"transformer_blocks": "norm1"},
    "pixart_sigma": {"transformer_blocks": "norm1"},
    "cogvideox": {"transformer_blocks": "norm1"},
    "wan": {"blocks": "norm1"},
}


@functools.cache
def measured(name: str) -> Profile:
    return measure(shared(name), calls(name, shared(name)), sites=EVERYTHING)


def sites_of(profile: Profile) -> dict[str, SiteProfile]:
    ((_, denoiser),) = profile.denoisers.items()
    return dict(denoiser.sites)


def denoiser_of(name: str) -> nn.Module:
    found: nn.Module = getattr(shared(name), TINY[name].denoisers[0])
    return found


class Listener:
    """What goes into a module and comes out, call by call, by hooks."""

    def __init__(self, module: nn.Module, *, last: bool = False) -> None:
        self.module, self.last = module, last
        self.given: list[np.ndarray] = []
        self.made: list[np.ndarray] = []
        self.bytes = 0
        self.first = next(n for n in inspect.signature(type(module).forward).parameters if n != "self")
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.given.append(vectors(args[0] if args else kwargs[self.first]))

    def after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found = [t for t in (output if isinstance(output, tuple) else [output]) if isinstance(t, Tensor)]
        self.made.append(vectors(found[-1 if self.last else 0]))
        self.bytes = sum(t.numel() * t.element_size() for t in found)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def vectors(tensor: Tensor) -> np.ndarray:
    plain = tensor.detach().double().numpy()
    return np.moveaxis(plain, 1, -1) if plain.ndim > 3 else plain


def by_branch(name: str, runs: list[list[np.ndarray]]) -> np.ndarray:
    """[branches, samples, T, tokens, channels] of what was recorded in each run."""
    branches = 1 if TINY[name].guidance == "none" else 2
    found = []
    for heard in runs:
        flat = np.stack(heard)
        found.append(flat.reshape(TINY[name].steps, branches, BATCH, *flat.shape[2:]).transpose(1, 2, 0, 3, 4))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", FIRST_NORM)
def test_tables_of_every_site_are_what_they_are_defined_to_be(name: str) -> None:
    found, pipe = sites_of(measured(name)), shared(name)
    wanted = {s: m for s, m in find_sites(denoiser_of(name)).items() if s != "model"}
    assert found.keys() == {"model", *wanted}
    runs: dict[str, list[tuple[Listener, Listener, Listener | None]]] = {site: [] for site in wanted}
    for call in calls(name, pipe):
        listeners = []
        for site, modules in wanted.items():
            granularity, _, path = site.partition(":")
            last = name in TEXT_FIRST and granularity != "sublayer"
            norm = Listener(getattr(modules[0], FIRST_NORM[name][path])) if granularity == "stack" else None
            trio = Listener(modules[0]), Listener(modules[-1], last=last), norm
            runs[site].append(trio)
            listeners += [one for one in trio if one]
        pipe(**call)
        for listener in listeners:
            listener.close()
    for site, heard in runs.items():
        inputs = by_branch(name, [first.given for first, _, _ in heard])
        outputs = by_branch(name, [last.made for _, last, _ in heard])
        norms = [norm.made for _, _, norm in heard if norm]
        check_tables(found[site], inputs, outputs, by_branch(name, norms) if norms else None)
        assert found[site].output_bytes == heard[0][1].bytes
        assert found[site].calls == (2 if TINY[name].guidance == "separate" else 1)


def test_branches_of_inner_sites_are_distinguished() -> None:
    for name in ("wan", "sd3"):  # two calls, and one batch
        gram = next(s for n, s in sites_of(measured(name)).items() if n.startswith("block:")).output.gram
        assert len(gram) == 2
        assert not np.allclose(gram[0], gram[1], rtol=0.01)


@pytest.mark.parametrize("name", ["flux", "dit", "wan"])
def test_operations_are_those_that_a_run_spends_in_the_site(name: str) -> None:
    with FlopCounterMode(display=False) as counter:
        shared(name)(**calls(name, shared(name))[0])
    spent = {path.partition(".")[2]: sum(by.values()) for path, by in counter.get_flop_counts().items()}
    found, forwards = sites_of(measured(name)), TINY[name].steps * (2 if TINY[name].guidance == "separate" else 1)
    for site, one in found.items():
        granularity, _, path = site.partition(":")
        if granularity in ("block", "sublayer"):
            assert one.flops * forwards == spent[path] > 0
        elif granularity == "stack":
            assert one.flops == sum(s.flops for n, s in found.items() if n.startswith(f"block:{path}."))
            assert one.flops < found["model"].flops


def test_seconds_are_attributed_to_the_sites_that_spend_them() -> None:
    pipe = fresh("flux")
    slow = pipe.transformer.single_transformer_blocks[1].attn

    def lingering(inner: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.03)
        return inner(*args, **kwargs)

    undo = layer(slow, "forward", lingering)
    found = sites_of(measure(pipe, calls("flux", pipe)[:1], sites=EVERYTHING, influence=False))
    undo()
    around = {
        "model",
        "stack:single_transformer_blocks",
        "block:single_transformer_blocks.1",
        "sublayer:single_transformer_blocks.1.attn",
    }
    for site, one in found.items():
        assert (one.seconds > 0.03) == (site in around), site
        assert one.seconds > 0
        assert one.influence is None


def test_measuring_inside_a_site_does_not_make_the_model_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fresh("flux")

    def slow(*args: Any) -> Tensor | None:
        time.sleep(0.01)
        return few(*args)

    monkeypatch.setattr("diffcache.profiling.recording.observe.few", slow)
    found = measure(pipe, calls("flux", pipe)[:1], sites="block", influence=False)
    assert sites_of(found)["model"].seconds < 0.05  # five blocks, two looks at each
    assert found.seconds < 6 * 0.05


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "dit"])
def test_influence_is_how_far_the_output_moves_when_a_site_is_a_step_old(name: str) -> None:
    pipe, network = shared(name), denoiser_of(name)
    found = sites_of(measured(name))
    forwards: list[tuple[Any, Any, Tensor]] = []

    def remember(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forwards.append((args, kwargs, output[0].clone()))

    handle = network.register_forward_hook(remember, with_kwargs=True)
    pipe(**calls(name, pipe)[0])
    handle.remove()
    if TINY[name].guidance == "separate":
        del forwards[1::2]
    at = [int(step) for step in measured(name).provenance["influence_steps"].split(", ")]
    assert set(at) <= set(range(1, TINY[name].steps))
    assert found["model"].influence == pytest.approx(np.ones(TINY[name].steps))
    different = {tuple(one.influence) for one in found.values() if one.influence is not None}
    assert len(different) >= len(found) - 2  # a stack ends with its last block
    for site, modules in find_sites(network).items():
        if site == "model":
            continue
        last = name in TEXT_FIRST and not site.startswith("sublayer:")
        expected = [_influence(network, modules[-1], forwards[i - 1], forwards[i], last) for i in at]
        influence = found[site].influence
        assert influence is not None
        assert influence[at] == pytest.approx(expected, rel=1e-4)
        assert influence[0] == influence[at[0]]  # held before the first that was measured
        between = np.interp(np.arange(TINY[name].steps), at, expected)
        assert influence == pytest.approx(between, rel=1e-4)


def _influence(network: nn.Module, module: nn.Module, before: Any, now: Any, last: bool) -> float:
    kept: list[Any] = []
    watch = module.register_forward_hook(lambda m, a, output: kept.append(output))
    with torch.no_grad():
        network(*before[0], **before[1])
        network(*now[0], **now[1])
    watch.remove()
    replace = module.register_forward_hook(lambda m, a, output: kept[0])
    with torch.no_grad():
        moved = network(*now[0], **now[1])[0]
    replace.remove()
    a, b = ([t for t in (k if isinstance(k, tuple) else [k]) if isinstance(t, Tensor)] for k in kept)
    j = -1 if last else 0
    return float((moved - now[2]).square().mean() / (a[j] - b[j]).square().mean())


def test_influence_costs_no_more_than_it_may() -> None:
    assert steps_to_measure(50, 50, 10, 4) == [7, 19, 31, 43]
    assert steps_to_measure(6, 6, 2, 9) == [1, 2, 3, 4, 5]
    assert steps_to_measure(50, 50, 98, 4) == [13, 37]
    assert steps_to_measure(50, 100, 98, 4) == [7, 19, 31, 43]  # a run of two calls a step may cost more
    assert steps_to_measure(50, 50, 1000, 4) == [25]  # one at least
    for steps in range(2, 40):
        for sites in (1, 7, 60):
            at = steps_to_measure(steps, steps, sites, 5)
            assert at == sorted(set(at))
            assert set(at) <= set(range(1, steps))
            assert len(at) * (sites + 2) <= max(MOST_RUNS * steps, sites + 2)


def test_influence_is_left_out_where_it_is_not_asked_for() -> None:
    pipe = shared("flux")
    assert all(s.influence is None for s in sites_of(measure(pipe, calls("flux", pipe)[:1])).values())
    found = measure(pipe, calls("flux", pipe)[:1], sites="stack", influence=False)
    assert all(s.influence is None for s in sites_of(found).values())
    found = measure(pipe, calls("flux", pipe)[:1], sites="stack", influence_steps=1)
    assert found.provenance["influence_steps"] == "3"


def test_of_many_tokens_few_are_kept_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_sites, "ELEMENTS", 35)
    measured_sites._chosen.cache_clear()
    ids = torch.arange(40.0)
    tensor = ids[None, :, None] + torch.zeros(2, 40, 10)
    kept = few(tensor, 2)
    assert kept is not None
    assert kept.shape == (2, 3, 10)  # 35 elements are three tokens of ten channels
    tokens = kept[0, :, 0]
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    assert torch.equal(kept, tokens[None, :, None].expand(2, 3, 10))  # all channels, the same of both samples
    assert torch.equal(few(tensor + 100, 2), kept + 100)  # type: ignore[arg-type]
    measured_sites._chosen.cache_clear()  # as in another process with another random state
    torch.randn(3)
    assert torch.equal(few(tensor, 2), kept)  # type: ignore[arg-type]
    picture = few(tensor.movedim(2, 1).reshape(2, 10, 8, 5), 2)
    assert picture is not None
    assert torch.equal(picture, kept)  # channels first
    every = few(ids[None, :2, None] + torch.zeros(1, 2, 10), 1)
    assert every is not None
    assert every.shape == (1, 2, 10)
    frames = few(torch.arange(12.0).reshape(4, 3, 1), 2)  # each sample is two rows
    assert frames is not None
    assert frames[:, :, 0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    measured_sites._chosen.cache_clear()


def test_a_tensor_passed_on_is_kept_once_unless_it_is_written_to() -> None:
    memory = observe._Memory()
    forward = observe._Forward(0, 2, memory)
    tensor = torch.randn(2, 3, 4)
    kept = forward.look(tensor)
    assert kept is not None
    assert torch.equal(kept, tensor)
    assert forward.look(tensor) is kept
    tensor.add_(1)
    again = forward.look(tensor)
    assert again is not kept
    assert torch.equal(again, kept + 1)  # type: ignore[arg-type]
    assert forward.look(tensor.clone()) is not again
    with torch.inference_mode():
        unversioned = torch.randn(2, 3, 4)
        first = forward.look(unversioned)
        unversioned.add_(1)
        assert torch.equal(forward.look(unversioned), first + 1)  # type: ignore[arg-type, operator]


class Twice(nn.Module):
    """A denoiser that calls its one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.block(x)
        return self.block(once + 1)  # type: ignore[no-any-return]


def test_the_last_loop_counts_and_of_visits_in_one_forward_the_first() -> None:
    network = Twice()
    observer = observe.Observer({"block:block": (network.block,)})
    with observer.attached():
        for loop, steps in ((0, 3), (1, 2)):  # a pipeline may run its loop several times
            for step in range(steps):
                with observer.forward(step, 0, 1):
                    network(torch.full((1, 2, 3), 10.0 * loop + step))
        network(torch.zeros(1, 2, 3))  # outside of a loop
    assert observer.calls == {"block:block": 2}
    rows = observer.series("block:block", 2)
    assert not isinstance(rows, str)
    assert [t.flatten()[0].item() for t in rows[0].outputs] == [10, 11]
    assert observer.series("block:block", 3) == "is not called at every step"


def test_memory_is_used_again() -> None:
    memory = observe._Memory()
    first = memory.copy(torch.ones(3))
    second = memory.copy(torch.zeros(3))
    assert first.tolist() == [1, 1, 1]
    memory.take_back()
    third = [memory.copy(torch.full((3,), 5.0)) for _ in range(2)]
    assert {t.data_ptr() for t in third} == {first.data_ptr(), second.data_ptr()}
    assert memory.copy(torch.ones(3)).data_ptr() not in {t.data_ptr() for t in third}
    memory.take_back()
    assert memory.copy(torch.ones(3, dtype=torch.float64)).dtype == torch.float64


def test_tables_are_of_the_tokens_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, site = shared("dit"), "block:transformer_blocks.1"
    monkeypatch.setattr(measured_sites, "ELEMENTS", 200)
    measured_sites._chosen.cache_clear()
    found = sites_of(measure(pipe, calls("dit", pipe), sites="block", influence=False))[site]
    chosen = few(torch.arange(16.0)[None, :, None] + torch.zeros(1, 16, denoiser_of("dit").inner_dim), 1)
    assert chosen is not None
    tokens = chosen[0, :, 0].int().tolist()
    assert 1 < len(tokens) < 16
    measured_sites._chosen.cache_clear()
    given, made = [], []
    for call in calls("dit", pipe):
        listener = Listener(find_sites(denoiser_of("dit"))[site][0])
        pipe(**call)
        listener.close()
        given.append([x[:, tokens] for x in listener.given])
        made.append([x[:, tokens] for x in listener.made])
    check_tables(found, by_branch("dit", given), by_branch("dit", made))


def test_the_main_output_is_the_stream_that_came_in() -> None:
    x = torch.randn(2, 5, 3)
    same, other = x + 0.1, torch.randn(2, 5, 3)

    def moved(t: Tensor) -> float:
        return float((t - x).square().mean())

    assert main_output([torch.randn(2, 4, 3), same], x.shape, moved) == 1
    assert main_output([same, torch.randn(2, 4, 3)], x.shape, moved) == 0
    assert main_output([other, same], x.shape, moved) == 1  # both have its shape: the one that moved less
    assert main_output([torch.randn(2, 4, 3), torch.randn(2, 5, 6)], x.shape, moved) == 1  # but for the channels
    assert main_output([torch.randn(2, 4, 3), torch.randn(2, 7, 3)], x.shape, moved) == 0
    assert main_output([other], None, moved) == 0


def test_a_measured_run_is_the_run_and_leaves_no_trace() -> None:
    pipe = fresh("sd3")
    call = calls("sd3", pipe)[0]
    (plain,) = final_states(pipe, [call])
    measure(pipe, calls("sd3", pipe)[:1], sites=EVERYTHING)
    owners = [pipe, pipe.scheduler, *pipe.transformer.modules()]
    assert not any(isinstance(v, Layers) for owner in owners for v in vars(owner).values())
    assert torch.equal(final_states(pipe, calls("sd3", pipe)[:1])[0], plain)


def test_a_recording_is_dropped_once_it_was_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def record(*args: Any) -> Any:
        assert not [ref for ref in alive if ref() is not None]
        trajectory = recording.record(*args)
        for step in trajectory.steps:
            alive.extend(weakref.ref(t) for t in (step.result, *step.calls[0].outputs) if t is not None)
        return trajectory

    monkeypatch.setattr(sys.modules["diffcache.profiling.measuring.measure"], "record", record)
    pipe = shared("flux")
    gc.collect()
    gc.disable()  # at once, not whenever cycles are looked for
    try:
        measure(pipe, calls("flux", pipe), sites="block")
    finally:
        gc.enable()
    assert alive
    assert not [ref for ref in alive if ref() is not None]


def test_one_granularity_or_several() -> None:
    assert granularities("model") == ("model",)
    assert granularities("block, model") == ("model", "block")
    assert granularities(["sublayer", "stack"]) == ("model", "stack", "sublayer")
    for wrong in ("blocks", "", [], ["block", 3], "block;stack"):
        with pytest.raises(BadOption, match="one or several of model, stack, block, sublayer"):
            granularities(wrong)  # type: ignore[arg-type]
    pipe = shared("flux")
    found = sites_of(measure(pipe, calls("flux", pipe)[:1], sites="stack"))
    assert {site.partition(":")[0] for site in found} == {"model", "stack"}


def test_what_has_no_such_sites_is_refused() -> None:
    pipe = shared("sd15")
    with pytest.raises(UnsupportedModel, match=r"no sites of the granularity 'block'.*It has model"):
        measure(pipe, calls("sd15", pipe)[:1], sites="block")


def test_sites_inside_a_compiled_graph_are_refused() -> None:
    pipe = fresh("flux")
    pipe.transformer.transformer_blocks[1]._compiled_call_impl = lambda *args: None  # what Module.compile leaves
    with pytest.raises(UnsupportedModel, match=r"'sublayer:transformer_blocks\.1\.attn'.*'transformer_blocks\.1'"):
        measure(pipe, calls("flux", pipe)[:1], sites="sublayer")


def test_a_site_that_is_not_always_called_is_left_out_with_the_reason() -> None:
    pipe = fresh("flux")
    blocks = pipe.transformer.single_transformer_blocks
    count = [0]

    def skipped(inner: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        return inner(*args, **kwargs)

    undo = layer(blocks[1], "forward", skipped)
    found = measure(pipe, calls("flux", pipe)[:1], sites="block,sublayer", influence=False)
    undo()
    assert "sublayer:single_transformer_blocks.1.attn is not called at every step" in found.provenance["left_out"]
    assert "sublayer:single_transformer_blocks.1.attn" not in sites_of(found)
    assert "sublayer:single_transformer_blocks.2.attn" in sites_of(found)


@pytest.mark.parametrize("name", ["z_image", "ltx2", "hunyuan_video_true_cfg", "lumina2", "mochi", "auraflow"])
def test_other_pipelines_are_measured_too(name: str) -> None:
    pipe = shared(name)
    found = measure(pipe, calls(name, pipe)[:1], sites=EVERYTHING)
    assert Profile.from_bytes(found.to_bytes()) == found
    assert len({site.partition(":")[0] for site in sites_of(found)}) == 4
    for one in sites_of(found).values():
        assert one.output.l1.any()
        assert one.flops > 0


@pytest.mark.parametrize("sites", ["stack", "block", "sublayer"])
def test_lists_of_blocks_are_reported_in_the_order_in_which_they_run(sites: str) -> None:
    pipe = shared("flux")
    found = measure(pipe, calls("flux", pipe)[:1], sites=sites, influence=False)
    assert found.provenance["stacks"] == "transformer_blocks, single_transformer_blocks"


def test_loops_that_end_at_once_have_no_influence() -> None:
    pipe = shared("flux")
    call = calls("flux", pipe)[0] | {"num_inference_steps": 1}
    found = measure(pipe, [call], sites="block")
    assert found.steps == 1
    assert all(s.influence is None for s in sites_of(found).values())
    assert diffcache.plan(found, "closed_loop", 1).steps == 1
