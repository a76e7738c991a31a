"""A transformer diffusion policy for low-dimensional observations, in the layout of real-stanford's diffusion_policy.

``TransformerForDiffusion`` has the submodules, the parameter names and the call of the original, so that whatever finds
its way in one finds it in the other. ``DiffusionTransformerLowdimPolicy`` holds the network, the noise scheduler and
the scaling of observations and actions, and samples a stretch of actions with the loop of the original.

Shapes below: B batch, T horizon, To observed steps, O observation, A action.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# diffusers' samplers take one generator for the batch, or a list with one for each of its samples.
Generators = torch.Generator | list[torch.Generator] | None

SCALE = ":scale"  # what the name of a matrix kept as codes has, and then that of its rows' scales

SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    # Both begin at the last training step, which is pure noise; the schedule that they inherit would begin below it.
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    # The cosine schedule ends at a signal of zero, where the solver's log-SNR has no bound.
    "dpm": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "lambda_min_clipped": -5.1}),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a policy is built from. The defaults are those of DP-T: 8 layers, 4 heads, 256 channels."""

    obs_dim: int
    action_dim: int
    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    layers: int = 8
    heads: int = 4
    width: int = 256
    dropout: float = 0.0


class SinusoidalPosEmb(nn.Module):
    """Diffusion time as sines and cosines, from wavelengths of one step to ten thousand."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """[B] -> [B, dim]"""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * -(math.log(10000) / (half - 1)))
        angles = x[:, None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TransformerForDiffusion(nn.Module):
    """Noise in a stretch of actions, given the diffusion time and what was observed.

    A decoder over the T actions; they attend to each other causally, and to a memory of 1 + To tokens (time,
    observations), of which action t sees the time and the observations of steps up to t.
    """

    mask: Tensor
    memory_mask: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, memory = shape.width, 1 + shape.n_obs_steps
        self.input_emb = nn.Linear(shape.action_dim, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, shape.horizon, width))
        self.drop = nn.Dropout(shape.dropout)
        self.time_emb = SinusoidalPosEmb(width)
        self.cond_obs_emb = nn.Linear(shape.obs_dim, width)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, memory, width))
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(
            width, shape.heads, 4 * width, shape.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, shape.layers)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.action_dim)

        # Added to attention scores: 0 where a query may look, −∞ where not. The time, first of the memory, is for all.
        step, other, token = (torch.arange(n) for n in (shape.horizon, shape.horizon, memory))
        self.register_buffer("mask", _forbid(other > step[:, None]))
        self.register_buffer("memory_mask", _forbid(token - 1 > step[:, None]))
        self.apply(_init)
        for embedding in (self.pos_emb, self.cond_pos_emb):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, sample: Tensor, timestep: Tensor | int | float, cond: Tensor, **_: Any) -> Tensor:
        """sample [B, T, A], timestep a number, a 0-dim tensor or [B], cond [B, To, O] -> noise [B, T, A]"""
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        memory = torch.cat([self.time_emb(time).to(sample.dtype)[:, None], self.cond_obs_emb(cond)], dim=1)
        memory = self.encoder(self.drop(memory + self.cond_pos_emb[:, : memory.shape[1]]))
        length = sample.shape[1]
        x = self.drop(self.input_emb(sample) + self.pos_emb[:, :length])
        seen = self.memory_mask[:length, : memory.shape[1]]
        x = self.decoder(x, memory, tgt_mask=self.mask[:length, :length], memory_mask=seen)
        return self.head(self.ln_f(x))


def _forbid(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


def _init(module: nn.Module) -> None:
    """Small normal weights and no biases, in the attentions' joint projections too, as the original begins."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.zeros_(module.in_proj_bias)


class MinMax(nn.Module):
    """Scales every channel to [-1, 1] over the data it was fitted to; a channel that stands still becomes 0."""

    scale: Tensor
    offset: Tensor

    STILL = 1e-4  # a smaller range is the simulator's jitter, which must not be blown up to the size of a signal

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))

    def fit(self, data: Tensor) -> None:
        """data [N, channels]"""
        low, high = data.min(0).values, data.max(0).values
        still = high - low < self.STILL
        self.scale.copy_(torch.where(still, 1.0, 2 / (high - low)))
        self.offset.copy_(-self.scale * (low + high) / 2)

    def normalize(self, x: Tensor) -> Tensor:
        """[..., channels] -> the same, in [-1, 1] where the data lay"""
        return x * self.scale + self.offset

    def unnormalize(self, x: Tensor) -> Tensor:
        """The inverse of ``normalize``."""
        return (x - self.offset) / self.scale


class DiffusionTransformerLowdimPolicy(nn.Module):
    """From the last To observations to the next actions: ``predict_action({"obs": [B, To, O]})``.

    To sample otherwise, set ``noise_scheduler`` and ``num_inference_steps``, or call ``use_sampler``.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.horizon = shape.horizon
        self.n_obs_steps = shape.n_obs_steps
        self.n_action_steps = shape.n_action_steps
        self.model = TransformerForDiffusion(shape)
        self.normalizer = nn.ModuleDict({"obs": MinMax(shape.obs_dim), "action": MinMax(shape.action_dim)})
        self.noise_scheduler: SchedulerMixin = training_scheduler()
        self.num_inference_steps = 100

    @torch.no_grad()
    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> Tensor:
        """A normalised stretch of actions [B, T, A], equal to ``condition_data`` [B, T, A] where the mask is true.

        ``cond`` [B, To, O] is what the network is told; ``kwargs`` go to the noise scheduler's ``step``.
        """
        shape, device, dtype = condition_data.shape, condition_data.device, condition_data.dtype
        trajectory = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory = torch.where(condition_mask, condition_data, trajectory)
            output = self.model(trajectory, t, cond)
            trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator, **kwargs).prev_sample
        return torch.where(condition_mask, condition_data, trajectory)

    @torch.no_grad()
    def predict_action(self, obs_dict: dict[str, Tensor], generator: Generators = None) -> dict[str, Tensor]:
        """{"obs": [B, To, O]} -> {"action": [B, n_action_steps, A], "action_pred": [B, T, A]}

        ``action`` is what to do now: the part of ``action_pred`` that begins at the newest observation.
        """
        cond = self.normalizer["obs"].normalize(obs_dict["obs"][:, : self.n_obs_steps])
        empty = cond.new_zeros(len(cond), self.horizon, self.shape.action_dim)
        sample = self.conditional_sample(empty, torch.zeros_like(empty, dtype=torch.bool), cond, generator)
        predicted = self.normalizer["action"].unnormalize(sample)
        now = self.n_obs_steps - 1
        return {"action": predicted[:, now : now + self.n_action_steps], "action_pred": predicted}

    def compute_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """{"obs": [B, To or more, O], "action": [B, T, A]} -> mean squared error of the predicted noise"""
        clean = self.normalizer["action"].normalize(batch["action"])
        cond = self.normalizer["obs"].normalize(batch["obs"][:, : self.n_obs_steps])
        noise = torch.randn_like(clean)
        steps = self.noise_scheduler.config.num_train_timesteps
        t = torch.randint(steps, (len(clean),), device=clean.device)
        predicted = self.model(self.noise_scheduler.add_noise(clean, noise, t), t, cond)
        return F.mse_loss(predicted.float(), noise)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write safetensors: the network's weights as ``dtype``, the scaling in full. ``torch.int8``: matrices as codes
        with a scale for each row, the rest as float16.

        A path with a suffix becomes one file; without one, a folder of files below 5 MB.
        """
        kept, path = {}, Path(path)
        matrices = {name for name, x in self.named_parameters() if x.ndim == 2} if dtype == torch.int8 else set()
        for name, x in self.state_dict().items():
            if name in matrices:
                scale = x.abs().amax(1, keepdim=True) / 127
                kept[name], kept[name + SCALE] = (x / scale).round().to(torch.int8), scale
            elif name.startswith("model."):
                kept[name] = x.to(torch.float16 if dtype == torch.int8 else dtype)
            else:
                kept[name] = x
        kept = {name: x.cpu().contiguous() for name, x in kept.items()}
        about = {"shape": json.dumps(asdict(self.shape))}
        if path.suffix:
            save_file(kept, path, about)
        else:
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("*.safetensors"):
                old.unlink()
            split = split_torch_state_dict_into_shards(kept, max_shard_size="4900KB")
            for file, names in split.filename_to_tensors.items():
                save_file({name: kept[name] for name in names}, path / file, about)

    @classmethod
    def load(cls, path: str | Path) -> DiffusionTransformerLowdimPolicy:
        """The policy that ``save`` wrote to this file or folder, in float32, ready to be asked."""
        path, kept = Path(path), {}
        for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with safe_open(part, "pt") as file:
                shape = Shape(**json.loads(file.metadata()["shape"]))
                kept |= {name: file.get_tensor(name).float() for name in file.keys()}
        policy = cls(shape)
        policy.load_state_dict(
            {name: x * kept.get(name + SCALE, 1.0) for name, x in kept.items() if not name.endswith(SCALE)}
        )
        return policy.eval()


def training_scheduler() -> DDPMScheduler:
    """Noise as the published policies are trained with."""
    return DDPMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=True,
        variance_type="fixed_small",
    )


def use_sampler(policy: DiffusionTransformerLowdimPolicy, name: str, steps: int) -> None:
    """Let ``policy`` sample with ``steps`` steps of one of ``SAMPLERS``, on the noise levels it was trained with."""
    kind, options = SAMPLERS[name]
    policy.noise_scheduler = kind.from_config(training_scheduler().config, **options)
    policy.num_inference_steps = steps
