"""The executor on a small loop of our own: equation (1) against a naive loop, and what it does when it cannot predict.

The loop is a real diffusers pipeline with a real noise scheduler; its denoiser is small enough to be odd in one way at
a time, which the families of diffusers are not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from probes import bound, hold, ours
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerated, report
from diffcache.adapters import find_sites
from diffcache.errors import ScheduleMismatch, UnsupportedModel
from diffcache.executor import FailedOpen
from diffcache.executor.guess import combine, problem
from diffcache.executor.program import Terms
from diffcache.schedule import DenoiserPlan, Guidance, SitePlan
from diffcache.store import Anchor, Output, signature

STEPS = 8
MASK = "#.##.#.."
SEPARATE = Guidance(mode="separate", branches=2)
BATCHED = Guidance(mode="batched", branches=2)
NAN = float("nan")


class ToyAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)
        self.calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.mix(hidden_states))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = ToyAttention(channels)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        return hidden_states + self.attn(hidden_states) * (1 + time)


class Net(nn.Module):
    """Samples [B, tokens, 3] or pictures [B, 3, H, W] in and out. ``odd``: what it does differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(3) for _ in range(3)])
        self.odd: Callable[[int, Any], Any] = lambda call, output: output
        self.between: Callable[[int, Tensor], Tensor] = lambda block, x: x
        self.left_out: tuple[int, ...] = ()
        self.seen: list[tuple[Any, Any]] = []

    def forward(self, hidden_states: Any, timestep: Tensor, prompt: Tensor) -> Any:
        x = hidden_states[0] if isinstance(hidden_states, list) else hidden_states
        pictures = x.ndim == 4
        h = x.movedim(1, -1) if pictures else x
        h = h[..., :3] + prompt
        for i, block in enumerate(self.blocks):
            if i not in self.left_out:
                h = self.between(i, block(h, timestep.to(h.dtype) / 1000))
        output = self.odd(len(self.seen), h.movedim(-1, 1) if pictures else h)
        self.seen.append((hidden_states, output))
        return (output,)


class Loop(DiffusionPipeline):
    """``guide``: how two branches reach the denoiser. ``before``: the state may be changed before each step.
    ``behind``: condition channels."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.guide = "none"
        self.before: Callable[[int, Tensor], Tensor] = lambda i, x: x
        self.behind: Callable[[Tensor], list[Tensor]] = lambda x: []
        self.given: list[tuple[Tensor, Any]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int = STEPS) -> Tensor:
        prompts = torch.tensor([0.3, -0.2], dtype=x.dtype)
        self.scheduler.set_timesteps(steps)
        self.given = []
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                x = self.before(i, x)
                if self.guide == "batched":
                    each = prompts.repeat_interleave(len(x)).view(-1, *[1] * (x.ndim - 1))
                    parts = list(self.ask(torch.cat([x, x]), t, each).chunk(2))
                else:
                    parts = [self.ask(x, t, p) for p in prompts[: 1 + (self.guide == "separate")]]
                guided = parts[0] if len(parts) == 1 else parts[1] + 2.0 * (parts[0] - parts[1])
                guided = guided[tuple(slice(n) for n in x.shape)]  # what comes back may be longer
                x = self.scheduler.step(guided.float(), t, x, return_dict=False)[0]
                bar.update()
        self.maybe_free_model_hooks()
        return x

    def ask(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        x = torch.cat([x, *self.behind(x)], dim=1 if x.ndim == 4 else -1)
        output = self.transformer(hidden_states=x, timestep=t, prompt=prompt)[0]
        self.given.append((x, output))
        return output[0] if isinstance(output, (list, tuple)) else output


def loop(guide: str = "none", odd: Callable[[int, Any], Any] | None = None) -> Loop:
    pipe = Loop(Net().requires_grad_(False), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.guide = guide
    if odd:
        pipe.transformer.odd = odd
    return pipe


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 5, 3)), generator=torch.Generator().manual_seed(1)).to(dtype)


def random_plan(mask: str, branches: int, anchors: int, *, kappa: bool = True, channels: int = 0) -> SitePlan:
    """Any coefficients that keep the loop tame."""
    rng = np.random.default_rng(len(mask) + branches + anchors)
    compute = np.array([c == "#" for c in mask])
    kept = np.cumsum(compute)
    weights = rng.normal(size=(branches, len(mask), anchors)) * 0.4
    weights[:, :, 0] += 0.8
    weights[:, compute] = 0
    weights[:, np.arange(anchors) >= kept[:, None]] = 0
    shape = (branches, len(mask), channels) if channels else (branches, len(mask))
    return SitePlan(
        compute=compute,
        weights=weights,
        kappa=rng.normal(size=shape[:2]) * 0.5 if kappa else None,
        scale=rng.uniform(0.8, 1.2, size=shape),
        bias=rng.normal(size=shape) * 0.1,
    )


def per_channel(value: np.ndarray, like: Tensor) -> Tensor:
    t = torch.tensor(value)
    return t.view(1, -1, 1, 1) if like.ndim == 4 and t.ndim else t


def naive(plan: SitePlan, row: int, calls: list[tuple[Tensor, Tensor]], i: int) -> Tensor:
    """Equation (1) in float64 for step ``i``, from what one branch was given and gave at each step."""
    anchors = [a for a in range(i - 1, -1, -1) if plan.compute[a]]
    total = sum(w * calls[a][1].double() for w, a in zip(plan.weights[row, i], anchors, strict=False))
    kappa = 0.0 if plan.kappa is None else plan.kappa[row, i]
    x, x_0 = calls[i][0].double(), calls[anchors[0]][0].double()
    like = calls[anchors[0]][1]
    channels = like.shape[1] if like.ndim == 4 else like.shape[-1]
    moved = (x - x_0)[:, :channels] if like.ndim == 4 else (x - x_0)[..., :channels]
    return per_channel(plan.scale[row, i], like) * (total + kappa * moved) + per_channel(plan.bias[row, i], like)


def assert_equation_1(pipe: Loop, plan: SitePlan, guidance: Guidance | None, x: Tensor) -> None:
    with accelerated(pipe, bound(pipe, plan, guidance=guidance)):
        pipe(x)
        rows = report(pipe).rows
    assert all(not row.failed_open for row in rows)
    computed = int(plan.compute.sum())
    assert {(row.computed, row.predicted) for row in rows} == {(computed, STEPS - computed)}
    if pipe.guide == "batched":
        halves = [tuple(t.chunk(2) for t in call) for call in pipe.given]
        branches = [[(call[0][b], call[1][b]) for call in halves] for b in range(2)]
    else:
        calls = 2 if pipe.guide == "separate" else 1
        branches = [pipe.given[b::calls] for b in range(calls)]
    for b, calls_of_branch in enumerate(branches):
        for i in np.flatnonzero(~plan.compute):
            expected = naive(plan, min(b, len(plan.weights) - 1), calls_of_branch, int(i))
            found = calls_of_branch[i][1]
            assert found.dtype == calls_of_branch[0][1].dtype
            largest = max(float(t.double().abs().max()) for call in calls_of_branch for t in call)  # terms may cancel
            error = torch.finfo(found.dtype).eps / 2 * expected.abs() + 2**-21 * largest
            assert bool(((found.double() - expected).abs() <= error).all()), f"branch {b}, step {i}"


# --- equation (1) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("guide", "guidance", "branches"),
    [
        ("none", None, 1),
        ("separate", None, 1),
        ("separate", SEPARATE, 1),
        ("separate", SEPARATE, 2),
        ("batched", None, 1),
        ("batched", BATCHED, 2),
    ],
)
@pytest.mark.parametrize("channels", [0, 3], ids=["scalar", "per channel"])
def test_what_is_predicted_is_equation_1(
    guide: str, guidance: Guidance | None, branches: int, channels: int, dtype: torch.dtype
) -> None:
    pipe = loop(guide)
    pipe.transformer.to(dtype)
    pipe.before = lambda i, x: x.to(dtype)
    assert_equation_1(pipe, random_plan(MASK, branches, 3, channels=channels), guidance, noise(dtype=dtype))


@pytest.mark.parametrize("channels", [0, 3], ids=["scalar", "per channel"])
def test_pictures_carry_their_channels_in_front(channels: int) -> None:
    assert_equation_1(loop(), random_plan(MASK, 1, 2, channels=channels), None, noise(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 6, 5)], ids=["tokens", "pictures"])
def test_condition_channels_behind_the_input_take_no_part(shape: tuple[int, ...]) -> None:
    """The input is wider than the output: what moves in the surplus channels is not the sample."""
    pipe = loop()
    pipe.behind = lambda x: [torch.rand_like(x)]
    assert_equation_1(pipe, random_plan(MASK, 1, 2), None, noise(*shape))


def test_channels_that_only_the_output_has_get_no_drift() -> None:
    """A learned variance comes back behind the sample's own channels."""
    pipe = loop(odd=lambda call, output: torch.cat([output, output.sin()], dim=1))
    plan = random_plan("#.", 1, 1)
    with accelerated(pipe, bound(pipe, plan)):
        pipe(noise(2, 3, 4, 5), steps=2)
    (x_0, first), (x, second) = pipe.given
    s, b, w, k = plan.scale[0, 1], plan.bias[0, 1], plan.weights[0, 1, 0], plan.kappa[0, 1]
    torch.testing.assert_close(second[:, :3], s * (w * first[:, :3] + k * (x - x_0)) + b)
    torch.testing.assert_close(second[:, 3:], s * w * first[:, 3:] + b)


def test_another_equation_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import guess

    right = guess.predict
    for wrong in (
        lambda anchors, weights, **o: right(anchors, weights, **{**o, "kappa": o["kappa"] * 1.001}),
        lambda anchors, weights, **o: right(anchors, weights, **{**o, "scale": 1.0}),
        lambda anchors, weights, **o: right(anchors[::-1], weights, **o),
        lambda anchors, weights, **o: right(anchors, weights[::-1], **o),
    ):
        monkeypatch.setattr(guess, "predict", wrong)
        with pytest.raises(AssertionError, match="step"):
            assert_equation_1(loop("separate"), random_plan(MASK, 2, 2), SEPARATE, noise())
    monkeypatch.setattr(guess, "predict", right)
    assert_equation_1(loop("separate"), random_plan(MASK, 2, 2), SEPARATE, noise())


# --- outputs of other forms ------------------------------------------------------------------------------------------


def anchor(value: Any, x: tuple[Tensor, ...]) -> Anchor:
    return Anchor(Output.of(value), x, signature(x))


def terms(weights: list[list[float]], kappa: list[float] | None = None, **more: Any) -> Terms:
    rows = len(weights)
    return Terms(
        anchors=tuple(range(len(weights[0]))),
        weights=tuple(map(tuple, weights)),
        kappa=tuple(kappa or [0.0] * rows),
        scale=more.get("scale", (1.0,) * rows),
        bias=more.get("bias", (0.0,) * rows),
    )


def test_of_two_outputs_each_takes_the_drift_of_the_input_of_its_shape() -> None:
    """Text before pictures, as Flux blocks return them; the input is the pictures."""
    x, x_0 = noise(1, 6, 4), noise(1, 6, 4) * 0.5
    text, pictures = noise(1, 3, 4), noise(1, 6, 4) + 1
    kept = anchor((text, pictures), (x_0,))
    wanted = terms([[1.0]], [0.5])
    assert problem([kept], wanted, (x,), 0) is None
    found = combine([kept], wanted, (x,), 0)
    torch.testing.assert_close(found[0], text)
    torch.testing.assert_close(found[1], pictures + 0.5 * (x - x_0))


def test_a_batch_given_as_a_list_has_its_branches_in_equal_parts_of_the_list() -> None:
    """Z-Image: the list holds the samples of the first branch, then those of the second."""
    outputs = [noise(4, 1, 3, 2) + i for i in range(4)]
    x = tuple(noise(4, 1, 3, 2) * i for i in range(4))
    x_0 = tuple(t * 0 for t in x)
    kept = anchor((outputs,), x_0)
    wanted = terms([[1.0], [2.0]], [0.0, 0.5])
    assert problem([kept], wanted, x, None) is None
    (found,) = combine([kept], wanted, x, None)
    for i in (0, 1):
        torch.testing.assert_close(found[i], outputs[i])
    for i in (2, 3):
        torch.testing.assert_close(found[i], 2 * outputs[i] + 0.5 * x[i])
    assert "does not split" in str(problem([anchor((outputs[:3],), x_0[:3])], wanted, x[:3], None))


def test_indices_and_masks_are_held_not_interpolated() -> None:
    x = (noise(2, 3),)
    kept = [anchor((noise(2, 3), torch.tensor([5, 7]), torch.tensor([True, False])), x) for _ in range(2)]
    _, indices, mask = combine(kept, terms([[1.3, -0.3]]), x, 0)
    assert indices.tolist() == [5, 7]
    assert mask.tolist() == [True, False]
    assert indices.data_ptr() != kept[0].output.tensors[1].data_ptr()


@pytest.mark.parametrize(
    ("shape", "channels", "along"),
    [
        ((2, 5, 3), 3, 2),
        ((2, 3, 4, 5), 3, 1),
        ((2, 3, 4, 5, 6), 3, 1),
        ((2, 7, 4, 5, 6), 4, 2),  # CogVideoX: frames before channels
        ((2, 4, 9), 4, 1),  # Stable Audio: channels before length
        ((4, 1, 3, 2), 4, 0),  # Z-Image: one sample
    ],
)
def test_coefficients_per_channel_find_the_channels(shape: tuple[int, ...], channels: int, along: int) -> None:
    x = (noise(*shape),)
    scale = np.arange(1.0, channels + 1)
    found = combine([anchor(noise(*shape), x)], terms([[1.0]], scale=(scale,)), x, 0)
    view = [1] * len(shape)
    view[along] = -1
    torch.testing.assert_close(found, noise(*shape) * torch.as_tensor(scale, dtype=torch.float32).view(view))


# --- fail open -------------------------------------------------------------------------------------------------------


def assert_fails_open(
    pipe: Loop, schedule: CacheSchedule | str, says: str, failed: int, x: Tensor | None = None
) -> Tensor:
    """Runs twice; each run counts ``failed`` predictions that were computed instead, and only the first one warns."""
    x = noise() if x is None else x
    with accelerated(pipe, schedule):
        with pytest.warns(FailedOpen, match=says) as heard:
            one = pipe(x)
        assert len(heard) == 1
        assert f"{failed} predictions were computed in full instead" in str(heard[0].message)
        assert sum(sum(row.failed_open.values()) for row in report(pipe).rows) == failed
        assert says.replace("\\", "") in str(report(pipe))
        pipe.transformer.seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = pipe(x)
        assert sum(sum(row.failed_open.values()) for row in report(pipe).rows) == failed
        assert report(pipe).bytes_held == 0
    assert torch.equal(one, other)
    return one


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_an_output_that_is_not_finite_is_no_anchor(bad: float) -> None:
    """Step 3 gives NaN: step 4, which would refer to it, is computed; steps 6 and 7 refer to step 5 and are not."""
    pipe = loop(odd=lambda call, output: (output, torch.full((2,), bad if call == 2 else 1.0)))
    with accelerated(pipe, bound(pipe, hold(MASK))):  # computed: 0, 2, 3, 5
        with pytest.warns(FailedOpen, match="transformer/model: 1 predictions .* an anchor is missing"):
            pipe(noise())
        (row,) = report(pipe).rows
        assert (row.computed, row.predicted, dict(row.failed_open)) == (
            4,
            3,
            {"an anchor is missing (late start, another denoiser, or non-finite output)": 1},
        )
        assert report(pipe).computed == len(pipe.transformer.seen) == 5


def test_a_failed_prediction_is_the_untouched_computation() -> None:
    """With nothing but failures left, the bits are those of the untouched loop."""
    plain = loop(odd=lambda call, output: (output, torch.full((2,), NAN)))(noise())
    pipe = loop(odd=lambda call, output: (output, torch.full((2,), NAN)))
    found = assert_fails_open(pipe, bound(pipe, hold(MASK)), "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_another_resolution_in_mid_run_is_computed_until_there_are_anchors_of_it() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    assert_fails_open(pipe, "uniform:every=3", "shape, dtype or device of the input changed", failed=2)


def test_another_type_in_mid_run_is_computed_until_there_are_anchors_of_it() -> None:
    pipe = loop()
    pipe.before = lambda i, x: (pipe.transformer.to(torch.float64 if i >= 4 else torch.float32), x)[1]
    pipe.ask = lambda x, t, p: Loop.ask(  # type: ignore[method-assign]
        pipe, x.to(pipe.transformer.blocks[0].attn.mix.weight.dtype), t, p
    )
    assert_fails_open(pipe, "uniform:every=3", "shape, dtype or device of the input changed", failed=2)


def test_another_output_for_the_same_input_is_computed() -> None:
    """Two anchors of different shapes make no linear combination."""
    pipe = loop(odd=lambda call, output: torch.cat([output, output], 1) if call % STEPS == 0 else output)
    plan = random_plan("#.#.####", 1, 2, kappa=False)
    assert_fails_open(pipe, bound(pipe, plan), "dtype or device of the output changed", failed=1)


def test_outputs_whose_tensors_cannot_be_reached_are_computed() -> None:
    class Opaque(list):  # type: ignore[type-arg]
        """A type that nobody has told torch how to take apart."""

    plain = loop(odd=lambda call, output: Opaque([output]))(noise())
    pipe = loop(odd=lambda call, output: Opaque([output]))
    schedule = bound(pipe, hold(MASK))
    found = assert_fails_open(pipe, schedule, "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_kappa_without_an_input_of_the_output_s_shape_is_computed() -> None:
    pipe = loop(odd=lambda call, output: output[:, :4])
    pipe.ask = (
        lambda x, t, p: torch.cat(  # type: ignore[method-assign]
            [pipe.transformer(hidden_states=x, timestep=t, prompt=p)[0], x[:, 4:]], dim=1
        )
    )
    plan = random_plan("#.######", 1, 1)
    assert_fails_open(pipe, bound(pipe, plan), "so kappa has no meaning", failed=1)


def test_coefficients_for_another_number_of_channels_are_not_used() -> None:
    pipe = loop()
    plan = random_plan("#.######", 1, 1, channels=7)
    assert_fails_open(pipe, bound(pipe, plan), "does not have the 7 channels", failed=1)


def test_a_batch_that_does_not_split_into_branches_is_computed() -> None:
    wanted = terms([[1.0], [2.0]])
    x = (noise(3, 5, 3),)
    assert "does not split" in str(problem([anchor(noise(3, 5, 3), x)], wanted, x, None))
    assert problem([anchor(noise(3, 5, 3), x)], wanted, x, 1) is None
    assert problem([anchor(noise(4, 5, 3), x)], wanted, x, None) is None


def test_a_step_beyond_the_schedule_is_computed() -> None:
    """A loop that takes more steps than its noise scheduler has timesteps."""
    pipe = loop()
    schedule = bound(pipe, hold("#.#."))
    with accelerated(pipe, schedule):
        pipe.scheduler.set_timesteps(4)
        timesteps = pipe.scheduler.timesteps
        with pytest.warns(FailedOpen, match="2 predictions were .*: step beyond the schedule"):
            ask_six_times_under_a_bar_of_four(pipe, timesteps)
        assert len(pipe.transformer.seen) == 4


@torch.no_grad()
def ask_six_times_under_a_bar_of_four(pipe: Loop, timesteps: Tensor) -> None:
    with pipe.progress_bar(total=4):
        for i in range(6):
            pipe.ask(noise(), timesteps[min(i, 3)] * 1, torch.tensor(0.0))  # a number: a view would tell its step
            if i < 4:
                pipe.scheduler.step(noise(), timesteps[i], noise())


def test_one_warning_names_the_first_site_and_counts_the_others() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    says = r"transformer/block:blocks.0 and 2 more sites: 6 predictions were computed in full instead: shape"
    with accelerated(pipe, "uniform:every=3,sites=block"):
        with pytest.warns(FailedOpen, match=says) as heard:
            pipe(noise())
        assert len(heard) == 1


def test_a_warning_made_an_error_leaves_the_pipeline_usable() -> None:
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, "uniform:every=3"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FailedOpen)
            with pytest.raises(FailedOpen):
                pipe(noise())
        assert report(pipe).bytes_held == 0
        assert "step" not in vars(pipe.scheduler)
        pipe(noise())
    assert ours(pipe) == []


def test_a_prediction_made_in_spite_of_the_obstacle_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import decide

    monkeypatch.setattr(decide, "problem", lambda anchors, *rest: None if anchors[0] else "an anchor is missing")
    pipe = loop(odd=lambda call, output: torch.cat([output, output], 1) if call % STEPS == 0 else output)
    plan = random_plan("#.#.####", 1, 2, kappa=False)
    with accelerated(pipe, bound(pipe, plan)), pytest.raises(RuntimeError, match="size of tensor"):
        pipe(noise())


def test_anchors_are_dropped_although_their_last_prediction_failed() -> None:
    pipe = loop()
    held: list[int] = []
    pipe.before = lambda i, x: (held.append(report(pipe).bytes_held), torch.cat([x, x], dim=1) if i == 4 else x)[1]
    with accelerated(pipe, "uniform:every=3"), pytest.warns(FailedOpen):
        pipe(noise())
    one = noise().numel() * 4
    # Computed: 0, 3, 6; the shape doubles at 4; 0 and 3 are dropped at 2 and 5, used or not.
    assert held == [0, one, one, 0, one, one, 0, 2 * one]


# --- stacks ----------------------------------------------------------------------------------------------------------


def stack(mask: str) -> CacheSchedule:
    return CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites={"stack:blocks": hold(mask)})})


def test_a_host_that_writes_into_what_lies_between_blocks_does_not_change_a_prediction() -> None:
    """Cosmos adds ControlNet residuals in place. At a predicted step they are in the prediction already."""

    def add(block: int, x: Tensor) -> Tensor:
        return x.add_(0.1) if block < 2 else x

    pipe = loop()
    pipe.transformer.between = add
    with accelerated(pipe, stack("#.#.#.#.")):
        pipe(noise())
        found = [output for _, output in pipe.given]
    for i in range(1, STEPS, 2):
        assert torch.equal(found[i], found[i - 1])
    assert pipe.transformer.blocks[0].attn.calls == 4


@pytest.mark.parametrize("left_out", [(0,), (1,), (0, 1)])
def test_a_host_that_leaves_out_blocks_is_followed(left_out: tuple[int, ...]) -> None:
    """SD3 can be told to skip layers, the first among them."""
    pipe = loop()
    pipe.transformer.left_out = left_out
    plain = pipe(noise())
    with accelerated(pipe, stack("########")):
        assert torch.equal(pipe(noise()), plain)
    calls = pipe.transformer.blocks[2].attn.calls
    with accelerated(pipe, stack("#.#.#.#.")):
        pipe(noise())
        rows = {row.site: row for row in report(pipe).rows}
        assert rows["stack:blocks"].predicted == 4
    assert pipe.transformer.blocks[2].attn.calls == calls + 4


def test_a_stack_whose_last_block_is_left_out_has_no_anchor_and_is_computed() -> None:
    pipe = loop()
    pipe.transformer.left_out = (2,)
    plain = pipe(noise())
    found = assert_fails_open(pipe, stack("#.#.#.#."), "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_predicted_outside_means_nothing_runs_inside() -> None:
    """Model, stack, block and sublayer at once: what lies inside a predicted site is not asked."""
    pipe = loop()
    sites = {
        "model": hold("##.#####"),
        "stack:blocks": hold("##.#.###"),
        "block:blocks.1": hold("##.#..##"),
        "sublayer:blocks.1.attn": hold("##.#...#"),
    }
    schedule = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=sites)})
    with accelerated(pipe, schedule):
        pipe(noise())
        rows = {row.site: (row.computed, row.predicted) for row in report(pipe).rows}
    assert rows == {
        "model": (7, 1),
        "stack:blocks": (6, 1),
        "block:blocks.1": (5, 1),
        "sublayer:blocks.1.attn": (4, 1),
    }
    assert [block.attn.calls for block in pipe.transformer.blocks] == [6, 4, 6]


def test_the_sites_of_the_toy_are_found() -> None:
    assert list(find_sites(Net())) == [
        "model",
        "stack:blocks",
        *(name for i in range(3) for name in (f"block:blocks.{i}", f"sublayer:blocks.{i}.attn")),
    ]


# --- wrappers and compilers ------------------------------------------------------------------------------------------


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


def test_a_schedule_copied_or_used_by_two_pipelines_is_only_read() -> None:
    one, other = loop(), loop()
    schedule = bound(one, random_plan(MASK, 1, 2))
    digest = schedule.digest()
    with accelerated(one, schedule), accelerated(other, copy.deepcopy(schedule)):
        assert torch.equal(one(noise()), other(noise()))
    assert schedule.digest() == digest
