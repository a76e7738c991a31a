"""The example policy: its network, its sampling, its data, its training, and its episodes in the simulator."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "policy"))  # scripts there import each other by name

import train
from model import (
    DiffusionTransformerLowdimPolicy,
    MinMax,
    Shape,
    TransformerForDiffusion,
    training_scheduler,
    use_sampler,
)

import diffcache
from diffcache.profiling import Calibration

SMALL = Shape(obs_dim=5, action_dim=2, horizon=6, n_obs_steps=2, n_action_steps=3, layers=2, heads=2, width=16)


def policy_of(shape: Shape = SMALL, steps: int = 4) -> DiffusionTransformerLowdimPolicy:
    """Untrained, but far from its small initial weights, so that every part of it shows in what comes out."""
    torch.manual_seed(0)
    policy = DiffusionTransformerLowdimPolicy(shape).eval()
    with torch.no_grad():
        for x in policy.model.parameters():
            x.add_(torch.randn_like(x) * 0.2)
    policy.normalizer["action"].fit(torch.tensor([[-3.1, 1.03], [5.2, 1.97]]))
    policy.num_inference_steps = steps
    return policy


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the network


def test_the_network_has_the_size_and_the_names_of_the_published_one() -> None:
    model = TransformerForDiffusion(Shape(obs_dim=20, action_dim=2))
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(9.0e6, rel=0.01)
    ends = {"pos_emb", "cond_pos_emb", "mask", "memory_mask"}
    ends |= {f"{name}.{kind}" for name in ("input_emb", "cond_obs_emb", "ln_f", "head") for kind in ("weight", "bias")}
    ends |= {f"encoder.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    names = set(model.state_dict())
    assert {name for name in names if not name.startswith("decoder.layers.")} == ends
    assert {name.split(".")[2] for name in names - ends} == {str(n) for n in range(8)}
    assert all(layer.norm_first and layer.activation is F.gelu for layer in model.decoder.layers)


def test_an_action_does_not_depend_on_later_ones() -> None:
    model = policy_of().model
    x, cond = torch.randn(2, 6, 2), torch.randn(2, 2, 5)
    other = x.clone()
    other[:, 3:] += 1
    with torch.no_grad():
        before, after = model(x, 7, cond), model(other, 7, cond)
        torch.testing.assert_close(before[:, :3], after[:, :3])
        assert not torch.isclose(before[:, 3:], after[:, 3:]).any()
        model.mask.zero_()  # without the mask the past sees the future
        assert not torch.isclose(model(x, 7, cond)[:, :3], model(other, 7, cond)[:, :3]).all()


def test_an_action_sees_the_time_and_the_observations_of_steps_up_to_its_own() -> None:
    model = policy_of().model
    x, cond = torch.randn(2, 6, 2), torch.randn(2, 2, 5)
    newest = cond.clone()
    newest[:, 1] += 1
    with torch.no_grad():
        before, after = model(x, 7, cond), model(x, 7, newest)
        torch.testing.assert_close(before[:, 0], after[:, 0])
        assert not torch.isclose(before[:, 1:], after[:, 1:]).any()
        assert not torch.isclose(before, model(x, 8, cond)).any()


def test_a_timestep_may_be_a_number_a_scalar_or_one_for_each_sample() -> None:
    model = policy_of().model
    x, cond = torch.randn(2, 6, 2), torch.randn(2, 2, 5)
    with torch.no_grad():
        expected = model(x, 7, cond)
        assert torch.equal(model(x, torch.tensor(7), cond), expected)
        assert torch.equal(model(x, torch.tensor([7, 7]), cond), expected)
        mixed = model(x, torch.tensor([7, 50]), cond)
    torch.testing.assert_close(mixed[0], expected[0])
    assert not torch.isclose(mixed[1], expected[1]).any()


# ---------------------------------------------------------------- the policy


def test_a_channel_that_stands_still_becomes_zero_and_comes_back() -> None:
    data = torch.tensor([[0.0, 7.0, -2.0], [4.0, 7.00001, 2.0], [1.0, 7.0, 1.0]])
    scaling = MinMax(3)
    scaling.fit(data)
    scaled = scaling.normalize(data)
    torch.testing.assert_close(scaled[:, 0], torch.tensor([-1.0, 1.0, -0.5]))
    assert scaled[:, 1].abs().max() < 1e-4
    torch.testing.assert_close(scaling.unnormalize(scaled), data)


def test_the_same_generator_gives_the_same_actions_and_another_does_not() -> None:
    policy, obs = policy_of(), {"obs": torch.randn(3, 2, 5)}
    first, again, other = (policy.predict_action(obs, generator=seeded(n))["action_pred"] for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_with_a_generator_for_each_a_sample_does_not_depend_on_its_batch_mates() -> None:
    policy, obs = policy_of(), torch.randn(3, 2, 5)
    together = policy.predict_action({"obs": obs}, generator=[seeded(n) for n in range(3)])["action"]
    for n in range(3):
        alone = policy.predict_action({"obs": obs[n : n + 1]}, generator=[seeded(n)])["action"]
        torch.testing.assert_close(alone[0], together[n], rtol=1e-4, atol=1e-4)


def test_a_condition_holds_at_every_step_and_at_the_end() -> None:
    policy, data = policy_of(), torch.rand(2, 6, 2)
    mask = torch.zeros(2, 6, 2, dtype=torch.bool)
    mask[:, :2], mask[0, 4, 1] = True, True
    seen: list[Tensor] = []
    policy.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sample = policy.conditional_sample(data, mask, torch.randn(2, 2, 5), seeded(0))
    assert len(seen) == 4
    for x in (*seen, sample):
        assert torch.equal(x[mask], data[mask])
        assert not torch.isclose(x[~mask], data[~mask]).any()


def test_what_is_done_now_begins_at_the_newest_observation() -> None:
    predicted = policy_of().predict_action({"obs": torch.randn(3, 2, 5)}, generator=seeded(0))
    assert predicted["action_pred"].shape == (3, 6, 2)
    assert torch.equal(predicted["action"], predicted["action_pred"][:, 1:4])
    assert predicted["action_pred"][..., 1].min() > 1.029  # in the units of the data, which go from 1.03 to 1.97
    assert predicted["action_pred"][..., 1].max() < 1.971


class Knowing(torch.nn.Module):
    """Knows the final action, so it can compute the noise exactly."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean, self.calls = clean, 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.calls += 1
        signal = training_scheduler().alphas_cumprod[t]
        return (x - signal.sqrt() * self.clean) / (1 - signal).sqrt()


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 100), ("ddim", 10), ("dpm", 10)])
def test_every_sampler_arrives_where_the_network_points(sampler: str, steps: int) -> None:
    policy = policy_of()
    use_sampler(policy, sampler, steps)
    clean = torch.rand(2, 6, 2) - 0.5
    policy.model = Knowing(clean)
    sample = policy.conditional_sample(torch.zeros(2, 6, 2), torch.zeros(2, 6, 2, dtype=torch.bool), None, seeded(0))
    assert policy.model.calls == steps
    assert policy.noise_scheduler.timesteps[0] >= 98  # from pure noise
    torch.testing.assert_close(sample, clean, rtol=0, atol=0.02)


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    policy, obs = policy_of(), {"obs": torch.randn(3, 2, 5)}
    policy.save(tmp_path / "full.safetensors", dtype=torch.float32)
    loaded = DiffusionTransformerLowdimPolicy.load(tmp_path / "full.safetensors")
    assert loaded.shape == policy.shape
    assert not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in policy.state_dict().items())
    loaded.num_inference_steps = policy.num_inference_steps
    expected, found = (each.predict_action(obs, generator=seeded(0))["action"] for each in (policy, loaded))
    assert torch.equal(expected, found)


def test_half_precision_rounds_the_weights_once_and_the_scaling_not_at_all(tmp_path: Path) -> None:
    policy = policy_of()
    policy.save(tmp_path / "once.safetensors")
    loaded = DiffusionTransformerLowdimPolicy.load(tmp_path / "once.safetensors")
    loaded.save(tmp_path / "twice.safetensors")
    assert (tmp_path / "once.safetensors").read_bytes() == (tmp_path / "twice.safetensors").read_bytes()
    assert torch.equal(loaded.normalizer["action"].scale, policy.normalizer["action"].scale)
    assert not torch.equal(loaded.model.head.weight, policy.model.head.weight)


def test_eight_bits_round_each_row_to_its_own_scale_and_lie_in_small_files(tmp_path: Path) -> None:
    policy = DiffusionTransformerLowdimPolicy(Shape(obs_dim=5, action_dim=2))
    policy.save(tmp_path / "policy")  # which the next one takes the place of
    policy.save(tmp_path / "policy", dtype=torch.int8)
    sizes = [file.stat().st_size for file in (tmp_path / "policy").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 5e6
    assert sum(sizes) < 1.1 * sum(x.numel() for x in policy.parameters())
    loaded = DiffusionTransformerLowdimPolicy.load(tmp_path / "policy")
    assert loaded.shape == policy.shape
    for (name, x), y in zip(policy.named_parameters(), loaded.parameters(), strict=True):
        if x.ndim == 2:
            error = (x - y).abs() / x.abs().amax(1, keepdim=True).clamp(min=1e-12)
            assert error.max() <= 0.5 / 127 + 1e-6, name
            assert error.max() > 0, name
        else:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(loaded.model.memory_mask, policy.model.memory_mask)  # whose -inf no scale could carry


# ---------------------------------------------------------------- training


def test_windows_repeat_the_ends_of_their_episode_and_never_leave_it() -> None:
    found = train.windows(np.array([5, 12]), horizon=4, before=1, after=2).tolist()
    assert found[:2] == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert found[3:6] == [[2, 3, 4, 4], [3, 4, 4, 4], [5, 5, 6, 7]]
    assert found[-1] == [10, 11, 11, 11]
    assert len(found) == 5 + 7
    assert train.windows(np.array([2]), horizon=4, before=1, after=1).tolist() == [[0, 0, 1, 1]]


def small_data() -> dict[str, np.ndarray]:
    """Two episodes in which the action is a function of the observation."""
    observations = np.random.default_rng(0).uniform(-1, 1, (40, 5)).astype(np.float32)
    return {"observations": observations, "actions": observations[:, :2] * 2, "ends": np.array([25, 40])}


def test_a_batch_begins_with_what_was_observed_when_its_actions_were_made() -> None:
    data = train.Demonstrations(small_data(), SMALL)
    assert data.windows[0].tolist() == [0, 0, 1, 2, 3, 4]  # the first step as the newest observation, in place 1
    assert data.windows[-1].tolist() == [36, 37, 38, 39, 39, 39]  # the last one as the last of 3 actions, in place 3
    batch = data.batch(32)
    assert batch["obs"].shape == (32, 2, 5)
    assert batch["action"].shape == (32, 6, 2)
    torch.testing.assert_close(batch["action"][:, :2], batch["obs"][..., :2] * 2)


def test_training_lowers_the_loss_is_resumed_and_leaves_the_averaged_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy, data = DiffusionTransformerLowdimPolicy(SMALL), train.Demonstrations(small_data(), SMALL)
    policy.normalizer["action"].fit(data.actions)
    losses = train.train(policy, data, tmp_path, minutes=5, batch=64, lr=3e-3, steps=150)
    assert len(losses) == 150
    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:10])

    written = DiffusionTransformerLowdimPolicy.load(tmp_path / "policy.safetensors")
    for name, x in policy.state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], x, rtol=1e-3, atol=1e-6)
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert last["step"] == 150
    assert not torch.equal(last["policy"]["model.head.weight"], policy.model.head.weight)  # those are the newest

    with pytest.raises(SystemExit, match="--resume"):
        train.train(policy, data, tmp_path, minutes=5, steps=200)
    assert len(train.train(policy, data, tmp_path, minutes=5, batch=64, resume=True, steps=160)) == 10
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["spent"] > last["spent"]


def test_a_checkpoint_on_the_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(folder: str) -> list[float]:
        torch.manual_seed(0)
        policy, data = DiffusionTransformerLowdimPolicy(SMALL), train.Demonstrations(small_data(), SMALL)
        return train.train(policy, data, tmp_path / folder, minutes=5, batch=8, lr=3e-2, steps=5)

    expected = losses("never")
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0)
    assert losses("always") == expected


def test_a_pause_counts_as_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, data = DiffusionTransformerLowdimPolicy(SMALL), train.Demonstrations(small_data(), SMALL)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=itertools.count(0, 1000).__next__))
    assert len(train.train(policy, data, tmp_path, minutes=3, batch=8)) == 3


# ---------------------------------------------------------------- the simulator


TASK = "drawer-open-v3"


@pytest.fixture(scope="module")
def demonstrations() -> ModuleType:
    pytest.importorskip("metaworld")
    import demonstrations

    return demonstrations


@pytest.fixture(scope="module")
def rollouts(demonstrations: ModuleType) -> ModuleType:
    import rollouts

    return rollouts


class Scripted:
    """The simulator's expert in the place of a policy; ``idle`` lets it do nothing."""

    n_obs_steps = 2
    n_action_steps = 2

    def __init__(self, task: str, idle: bool = False) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self.expert, self.idle = ENV_POLICY_MAP[task](), idle
        self.sizes: list[int] = []
        self.drawn: list[float] = []

    def predict_action(self, obs_dict: dict[str, Tensor], generator: list[torch.Generator]) -> dict[str, Tensor]:
        self.sizes.append(len(obs_dict["obs"]))
        self.drawn += [torch.rand((), generator=each).item() for each in generator]
        found = np.stack([self.expert.get_action(seen[-1].double().numpy()) for seen in obs_dict["obs"]])
        action = torch.from_numpy(found)[:, None].expand(-1, self.n_action_steps, -1)
        return {"action": torch.zeros_like(action) if self.idle else action}


@pytest.mark.parametrize("task", ["push-v3", TASK])
def test_every_episode_has_its_own_placement_and_shows_its_goal(demonstrations: ModuleType, task: str) -> None:
    env = demonstrations.environment(task)

    def starts(seed: int) -> list[Any]:
        found = []
        for placement in itertools.islice(demonstrations.placements(task, seed), 4):
            env.set_task(placement)
            first, _ = env.reset()
            second = env.step(np.zeros(4, np.float32))[0]
            assert np.array_equal(first[-3:], second[-3:])  # the goal stands still, and is there
            assert np.array_equal(first[-3:], env._target_pos)
            found.append(tuple(first))
        return found

    training, evaluation = starts(demonstrations.TRAINING_SEED), starts(demonstrations.EVALUATION_SEED)
    assert len({*training, *evaluation}) == 8
    assert starts(demonstrations.TRAINING_SEED) == training


def test_demonstrations_end_after_success_and_hold_what_the_expert_wanted(demonstrations: ModuleType) -> None:
    arrays, attempts = demonstrations.collect(TASK, 2, noise=0.1, stay=5)
    assert attempts >= len(arrays["ends"]) == 2
    assert arrays["ends"][-1] == len(arrays["observations"]) == len(arrays["actions"])
    assert arrays["observations"].dtype == arrays["actions"].dtype == np.float32
    expert = demonstrations.ENV_POLICY_MAP[TASK]()
    wanted = np.stack([np.clip(expert.get_action(x), -1, 1) for x in arrays["observations"].astype(float)])
    np.testing.assert_allclose(arrays["actions"], wanted, atol=1e-4)  # without the noise
    again, _ = demonstrations.collect(TASK, 2, noise=0.1, stay=5)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    assert demonstrations.demonstrate(demonstrations_env(demonstrations), Still(), np.random.default_rng(0)) is None


class Still:
    """An expert that does nothing."""

    def get_action(self, observation: np.ndarray) -> np.ndarray:
        return np.zeros(4)


def demonstrations_env(demonstrations: ModuleType) -> Any:
    env = demonstrations.environment(TASK)
    env.set_task(next(demonstrations.placements(TASK, 0)))
    return env


def test_rollouts_distinguish_success_from_failure_for_any_batch_size(rollouts: ModuleType) -> None:
    two, three = Scripted(TASK), Scripted(TASK)
    found = rollouts.rollout(two, TASK, 3, seed=5, at_once=2, timed_alone=1)
    assert found.success.all()
    assert (found.steps > 10).all()
    assert found.control_rate == pytest.approx(2 / found.alone_s)
    assert [size for size, _ in found.calls] == two.sizes[:-1]
    assert max(two.sizes) == 2
    together = rollouts.rollout(three, TASK, 3, seed=5, at_once=3, timed_alone=1)
    assert np.array_equal(together.steps, found.steps)
    assert {*three.drawn[:-1]} == {*two.drawn[:-1]}  # the noise of an episode does not ask who else is there
    assert len({*two.drawn}) == len(two.drawn)

    idle = rollouts.rollout(Scripted(TASK, idle=True), TASK, 2, seed=5, max_steps=9, timed_alone=1)
    assert not idle.success.any()
    assert idle.steps.tolist() == [9, 9]


def test_the_interval_is_wilsons(rollouts: ModuleType) -> None:
    assert rollouts.wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    low, high = rollouts.wilson(0, 20)
    assert (low, high) == (0, pytest.approx(0.161, abs=1e-3))
    assert rollouts.wilson(20, 20)[1] == pytest.approx(1)


# ---------------------------------------------------------------- the trained policy


WEIGHTS = Path(__file__).parents[2] / "examples" / "policy" / "weights" / "drawer-open-v3"


def test_the_trained_policy_opens_drawers(rollouts: ModuleType) -> None:
    policy = DiffusionTransformerLowdimPolicy.load(WEIGHTS)
    use_sampler(policy, "ddim", 5)
    assert rollouts.rollout(policy, "drawer-open-v3", 2, timed_alone=1).success.all()


@pytest.mark.parametrize(("sampler", "mask"), [("ddpm", "■··" * 10 + "■····■··■·"), ("ddim", "■■·■■··■····■·■■")])
def test_its_actions_survive_what_a_fitted_schedule_leaves_out(
    demonstrations: ModuleType, sampler: str, mask: str
) -> None:
    """The baselines are uniform reuse with the same number of computed steps, and DDIM with that number of steps."""
    compute = np.array([c == "■" for c in mask])
    steps, computed = len(mask), int(compute.sum())
    policy = DiffusionTransformerLowdimPolicy.load(WEIGHTS)
    use_sampler(policy, sampler, steps)
    seen = torch.from_numpy(demonstrations.collect("drawer-open-v3", 2)[0]["observations"])
    newest = torch.linspace(1, len(seen) - 1, 32).long()
    obs = torch.stack([seen[newest - 1], seen[newest]], 1)
    calls = [{"obs_dict": {"obs": obs[n::2]}, "seed": n} for n in range(2)]
    schedule = Calibration.record(policy, calls[:1]).fitted(compute)
    assert ("combined" in schedule.provenance) == (sampler == "ddpm")  # which draws noise

    def actions() -> Tensor:
        torch.manual_seed(5)
        return policy.predict_action({"obs": obs[1::2]})["action"]

    full = actions()
    with diffcache.accelerated(policy, schedule):
        ours = actions()
    with diffcache.accelerated(policy, f"uniform:every={-(-steps // computed)}"):
        reused = actions()
    use_sampler(policy, "ddim", computed)
    fewer = actions()
    error, *others = ((found - full).abs().mean().item() for found in (ours, reused, fewer))
    assert error < 0.5 * min(others)
