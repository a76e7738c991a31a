"""Policies to test with: the example's, and small ones built as other families of policies are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "policy"))
import model as example

STEPS, HORIZON, ACTION, OBS, WIDTH = 10, 8, 3, 5, 16


def randomised(module: nn.Module) -> Any:
    """Every parameter drawn anew: no gate may stand at zero, or a cache would pass for the wrong reason."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def diffusion_policy() -> example.DiffusionTransformerLowdimPolicy:
    shape = example.Shape(obs_dim=OBS, action_dim=ACTION, horizon=HORIZON, layers=3, heads=2, width=WIDTH)
    policy = example.DiffusionTransformerLowdimPolicy(shape)
    policy.num_inference_steps = STEPS
    return randomised(policy)


class Modulated(nn.Module):
    """A block with gates that depend on time, attention called ``multihead_attn`` and ``mlp`` a bare sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        first, second = self.adaLN_modulation(features)[:, None].chunk(2, dim=-1)
        normed = self.norm1(x)
        x = x + first * self.multihead_attn(normed, normed, normed)[0]
        return x + second * self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.input_proj, self.output_proj = nn.Linear(ACTION, WIDTH), nn.Linear(WIDTH, ACTION)
        self.transformer_blocks = nn.ModuleList([Modulated() for _ in range(3)])

    def forward(self, x: Tensor, timestep: Tensor, conditioning_vec: Tensor) -> Tensor:
        features = self.time(timestep[:, None].float() / 100) + conditioning_vec
        hidden = self.input_proj(x)
        for block in self.transformer_blocks:
            hidden = block(hidden, features)
        return self.output_proj(hidden)


class Objective(nn.Module):
    """Samples by DDPM, or integrates a flow by Euler or Runge-Kutta."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.objective == "diffusion":
            self.noise_scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
            self.num_inference_steps = STEPS

    def conditional_sample(self, model: nn.Module, batch_size: int, conditioning_vec: Tensor) -> Tensor:
        x = torch.randn(batch_size, HORIZON, ACTION)
        if self.config.objective == "diffusion":
            self.noise_scheduler.set_timesteps(self.num_inference_steps)
            for t in self.noise_scheduler.timesteps:
                output = model(x, t.expand(batch_size), conditioning_vec=conditioning_vec)
                x = self.noise_scheduler.step(output, t, x).prev_sample
            return x
        steps = self.config.num_integration_steps
        for i in range(steps):

            def flow(y: Tensor, t: float) -> Tensor:
                return model(y, torch.full((batch_size,), t), conditioning_vec=conditioning_vec) / steps

            if self.config.integration_method == "euler":
                x = x - flow(x, 1 - i / steps)
            else:
                a = flow(x, 1 - i / steps)
                b = flow(x - a / 2, 1 - (i + 0.5) / steps)
                c = flow(x - b / 2, 1 - (i + 0.5) / steps)
                x = x - (a + 2 * b + 2 * c + flow(x - c, 1 - (i + 1) / steps)) / 6
        return x


class MultiTask(nn.Module):
    def __init__(self, objective: str, method: str = "euler", steps: int = STEPS) -> None:
        super().__init__()
        self.config = SimpleNamespace(objective=objective, integration_method=method, num_integration_steps=steps)
        self.observation_encoder = nn.Linear(OBS, WIDTH)
        self.noise_predictor = Transformer()
        self.objective = Objective(self.config)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        seen = self.observation_encoder(batch["obs"][:, -1])
        return self.objective.conditional_sample(self.noise_predictor, len(seen), seen)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Modulated() for _ in range(3)])

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, features)
        return hidden


class Expert(nn.Module):
    """The action expert of a vision-language-action model, as pi0 has it: not a separate network, but a method, whose
    layers lie deep. With ``left``, the actions of the last call that are still to come, each step is guided to them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed, self.time = nn.Linear(OBS, WIDTH), nn.Linear(1, WIDTH)
        self.action_in_proj, self.action_out_proj = nn.Linear(ACTION, WIDTH), nn.Linear(WIDTH, ACTION)
        self.paligemma_with_expert, self.guided = nn.Module(), Guided()
        self.paligemma_with_expert.gemma_expert = nn.Module()
        self.paligemma_with_expert.gemma_expert.model = Layers()

    @torch.no_grad()
    def sample_actions(self, state: Tensor, num_steps: int | None = None, left: Tensor | None = None) -> Tensor:
        return self.integrated(state, self.config.num_inference_steps if num_steps is None else num_steps, left)

    def integrated(self, state: Tensor, steps: int, left: Tensor | None = None) -> Tensor:
        prefix, x = self.embed(state), torch.randn(len(state), HORIZON, ACTION)
        for i in range(steps):
            time = torch.full((len(state),), 1 - i / steps)

            def step(y: Tensor, time: Tensor = time) -> Tensor:
                return self.denoise_step(state=state, past_key_values=[prefix], x_t=y, timestep=time)

            x = x - (step(x) if left is None else self.guided(step, x, left)) / steps
        return x

    def denoise_step(self, state: Tensor, past_key_values: list[Tensor], x_t: Tensor, timestep: Tensor) -> Tensor:
        features = self.time(timestep[:, None]) + past_key_values[0]
        return self.action_out_proj(self.expert(self.action_in_proj(x_t), features))

    def expert(self, hidden: Tensor, features: Tensor) -> Tensor:
        return self.paligemma_with_expert.gemma_expert.model(hidden, features)


class Guided:
    """Real-time chunking: the step is taken with gradients, though the loop runs without.

    carried  whether what came back carried any, step by step
    """

    def __init__(self) -> None:
        self.carried: list[bool] = []

    def __call__(self, step: Callable[[Tensor], Tensor], x: Tensor, left: Tensor) -> Tensor:
        x = x.clone().detach()
        with torch.enable_grad():
            flow = step(x)
            self.carried.append(flow.requires_grad)
            x.requires_grad_(True)
            wanted = x - flow
            error = (left - wanted).detach()
            return flow - torch.autograd.grad(wanted, x, error)[0]


class Pi(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Expert(SimpleNamespace(num_inference_steps=STEPS))
        self.config = self.model.config

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **more: Any) -> Tensor:
        return self.model.sample_actions(batch["obs"][:, -1], **more)[..., :-1]  # the robot has fewer joints


class InParts(Expert):
    """As SmolVLA has it: what calls the layers reaches for their parts."""

    def sample_actions(self, state: Tensor) -> Tensor:  # type: ignore[override]
        return self.integrated(state, self.config.num_steps)

    def expert(self, hidden: Tensor, features: Tensor) -> Tensor:
        for layer in self.paligemma_with_expert.gemma_expert.model.layers:
            normed = layer.norm1(hidden + features[:, None])
            hidden = hidden + layer.multihead_attn(normed, normed, normed)[0]
            hidden = hidden + layer.mlp(layer.norm2(hidden))
        return hidden


class SmolVLA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = InParts(SimpleNamespace(num_steps=STEPS))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        actions = self.model.sample_actions(batch["obs"][:, -1])[..., :-1]
        actions[..., 0] *= -1  # for robots whose joints turn the other way, in the loop's own tensor
        return actions


class ActionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_inference_timesteps = STEPS
        self.action_encoder, self.action_decoder = nn.Linear(ACTION, ACTION), nn.Linear(ACTION, ACTION)
        self.model = Transformer()

    def get_action_with_features(self, features: Tensor) -> Tensor:
        actions = torch.randn(len(features), HORIZON, ACTION)
        for i in range(self.num_inference_timesteps):
            time = torch.full((len(features),), 100 * i // self.num_inference_timesteps)
            hidden = self.action_encoder(actions)
            flow = self.model(x=hidden, timestep=time, conditioning_vec=features)
            actions = actions + self.action_decoder(flow) / self.num_inference_timesteps
        return actions


class Groot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(OBS, WIDTH)
        self._groot_model = nn.Module()
        self._groot_model.action_head = ActionHead()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        return self._groot_model.action_head.get_action_with_features(self.embed(batch["obs"][:, -1]))


class Convolutions(nn.Module):
    """A U-Net's place is all that counts: nothing inside it is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(HORIZON, WIDTH, 1), nn.Mish(), nn.Conv1d(WIDTH, HORIZON, 1))
        self.cond = nn.Linear(OBS, ACTION)

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        return self.net(x) + self.cond(global_cond)[:, None] + timestep[:, None, None] / 100


class UNetPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion = nn.Module()
        self.diffusion.unet = Convolutions()
        self.diffusion.noise_scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
        self.diffusion.num_inference_steps = STEPS
        self.diffusion.conditional_sample = self.conditional_sample

    def conditional_sample(self, cond: Tensor) -> Tensor:
        x, scheduler = torch.randn(len(cond), HORIZON, ACTION), self.diffusion.noise_scheduler
        scheduler.set_timesteps(self.diffusion.num_inference_steps)
        for t in scheduler.timesteps:
            x = scheduler.step(self.diffusion.unet(x, t.expand(len(x)), global_cond=cond), t, x).prev_sample
        return x

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        return self.diffusion.conditional_sample(batch["obs"][:, -1])


@dataclass(frozen=True)
class Case:
    """A family.

    steps    evaluations of the network in one run
    replays  whether the network sees the state itself, and steps are affine in its output
    """

    make: Callable[[], Any]
    steps: int = STEPS
    granularities: tuple[str, ...] = ("model", "stack", "block", "sublayer")
    argument: str = "batch"
    replays: bool = True

    def call(self, samples: int = 4, seed: int = 1) -> dict[str, Any]:
        obs = torch.randn(samples, 2, OBS, generator=torch.Generator().manual_seed(seed))
        return {self.argument: {"obs": obs}}

    def act(self, policy: Any, samples: int = 4, seed: int = 1, **more: Any) -> Tensor:
        """Actions for the observations and the noise of one seed."""
        torch.manual_seed(seed)
        ask = policy.predict_action if hasattr(policy, "predict_action") else policy.predict_action_chunk
        made = ask(**self.call(samples, seed), **more)
        return made["action_pred"] if isinstance(made, dict) else made


CASES = {
    "diffusion_policy": Case(diffusion_policy, argument="obs_dict"),
    "multi_task_dit": Case(lambda: randomised(MultiTask("diffusion"))),
    "multi_task_dit, Euler": Case(lambda: randomised(MultiTask("flow"))),
    "multi_task_dit, Runge-Kutta": Case(lambda: randomised(MultiTask("flow", "rk4", 3)), steps=12, replays=False),
    "pi0": Case(lambda: randomised(Pi())),
    "smolvla": Case(lambda: randomised(SmolVLA()), granularities=("model",)),
    "groot": Case(lambda: randomised(Groot()), replays=False),
    "lerobot diffusion": Case(lambda: randomised(UNetPolicy()), granularities=("model",)),
}
