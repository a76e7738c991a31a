"""Policies of lerobot's own classes, small and with random weights, that fetch nothing: for ``lerobot_policies.py``.

pi0, pi0.5 and SmolVLA are whole. Of the others, what would come from the Hub (encoders of pictures and text) is left
out, and the condition is given instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import (
    DiffusionObjective,
    DiffusionTransformer,
    FlowMatchingObjective,
)
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn
from transformers import SmolVLMConfig

STEPS, SAMPLES, JOINTS, WIDTH, HORIZON = 20, 4, 4, 32, 8
PIXELS, WORDS = 28, 64
CAMERA, STATE = "observation.images.top", "observation.state"

Built = tuple[Any, dict[str, Any]]  # a policy, and arguments of predict_action_chunk


def randomised(policy: Any) -> Any:
    """Gates that begin at zero would let a cache pass for the wrong reason."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy.eval()


class MultiTask(nn.Module):
    """lerobot's network and objective; its policy would fetch CLIP."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.config = config = MultiTaskDiTConfig(hidden_dim=2 * WIDTH, num_layers=3, num_heads=4, **options)
        config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(JOINTS,))}
        self.noise_predictor = DiffusionTransformer(config, conditioning_dim=WIDTH)
        kind = DiffusionObjective if config.is_diffusion else FlowMatchingObjective
        self.objective = kind(config, action_dim=JOINTS, horizon=config.horizon)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        return self.objective.conditional_sample(self.noise_predictor, len(batch["seen"]), batch["seen"])


def multi_task(**options: Any) -> Built:
    return randomised(MultiTask(**options)), {"batch": {"seen": torch.randn(SAMPLES, WIDTH)}}


def diffusion() -> Built:
    config = DiffusionConfig(n_obs_steps=2, horizon=16, n_action_steps=8, down_dims=(32, 64), num_inference_steps=STEPS)
    config.input_features = {
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(6,)),
        "observation.environment_state": PolicyFeature(type=FeatureType.ENV, shape=(5,)),
    }
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(JOINTS,))}
    seen = {name: torch.randn(SAMPLES, 2, feature.shape[0]) for name, feature in config.input_features.items()}
    return randomised(DiffusionPolicy(config)), {"batch": seen}


class Groot(nn.Module):
    """lerobot's action head; its policy would fetch a language model."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 8, "positional_embeddings": None}
        config = GR00TN17Config(
            backbone_embedding_dim=WIDTH, hidden_size=WIDTH, input_embedding_dim=WIDTH, max_state_dim=6,
            max_action_dim=JOINTS, action_horizon=8, max_num_embodiments=2, num_inference_timesteps=STEPS,
            diffusion_model_cfg=layers | {
                "norm_type": "ada_norm", "dropout": 0.0, "output_dim": WIDTH, "interleave_self_attention": True
            },
            vl_self_attention_cfg=layers | {"num_layers": 0, "dropout": 0.0},
        )  # fmt: skip
        self._groot_model = nn.Module()
        self._groot_model.action_head = GR00TN17ActionHead(config)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        head, mask = self._groot_model.action_head, torch.ones(SAMPLES, 6, dtype=torch.bool)
        seen = SimpleNamespace(image_mask=torch.arange(6).expand(SAMPLES, 6) < 3, backbone_attention_mask=mask)
        where = torch.zeros(SAMPLES, dtype=torch.long)
        return head.get_action_with_features(batch["seen"], batch["state"], where, seen, {})["action_pred"]


def groot() -> Built:
    seen = {"seen": torch.randn(SAMPLES, 6, WIDTH), "state": torch.randn(SAMPLES, 1, WIDTH)}
    return randomised(Groot()), {"batch": seen}


def seen(config: Any, joints: int) -> dict[str, Tensor]:
    """Tell a configuration what a robot with so many joints sees and does, and make up what it sees."""
    config.input_features = {
        STATE: PolicyFeature(type=FeatureType.STATE, shape=(joints,)),
        CAMERA: PolicyFeature(type=FeatureType.VISUAL, shape=(3, PIXELS, PIXELS)),
    }
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(joints,))}
    return {
        STATE: torch.rand(SAMPLES, joints) / 10,
        CAMERA: torch.rand(SAMPLES, 3, PIXELS, PIXELS),
        "observation.language.tokens": torch.randint(1, WORDS, (SAMPLES, 5)),
        "observation.language.attention_mask": torch.arange(5).expand(SAMPLES, 5) < 4,
    }


def sizes(joints: int) -> dict[str, Any]:
    """Of a chunk of actions; they are filled up to more joints than the robot has."""
    return {
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON // 2,
        "max_state_dim": joints,
        "max_action_dim": joints + 2,
    }


def small_gemma(module: ModuleType) -> Any:
    """Within it, the networks of ``module`` (modeling_pi0 or modeling_pi05) are small, whatever their variant."""
    whole, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    # Training reckons with 8 heads.
    gemma = module.GemmaConfig(WIDTH, depth=3, mlp_dim=2 * WIDTH, num_heads=8, num_kv_heads=1, head_dim=8)

    def small_whole(config: Any) -> Any:
        eye, config.text_config.vocab_size = config.vision_config, WORDS
        eye.hidden_size, eye.intermediate_size, eye.projection_dim = WIDTH, 2 * WIDTH, WIDTH
        eye.num_hidden_layers = eye.num_attention_heads = 2
        return whole(config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = WORDS
        return expert(config)

    return mock.patch.multiple(
        module,
        get_gemma_config=lambda variant: gemma,
        PaliGemmaForConditionalGenerationWithPiGemma=small_whole,
        PiGemmaForCausalLM=small_expert,
    )


def pi(module: ModuleType, config_class: type, policy_class: type, **options: Any) -> Built:
    config = config_class(
        image_resolution=(PIXELS, PIXELS), num_inference_steps=STEPS, device="cpu", **sizes(JOINTS), **options
    )
    batch = seen(config, JOINTS)
    with small_gemma(module):
        return randomised(policy_class(config)), {"batch": batch}


def pi0(**options: Any) -> Built:
    return pi(modeling_pi0, PI0Config, modeling_pi0.PI0Policy, **options)


def pi05(**options: Any) -> Built:
    return pi(modeling_pi05, PI05Config, modeling_pi05.PI05Policy, **options)


def smolvla(joints: int = JOINTS, **options: Any) -> Built:
    layers = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    language = SmolVLMConfig(
        text_config=layers
        | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8, "vocab_size": WORDS, "pad_token_id": 0},
        vision_config=layers | {"image_size": PIXELS, "patch_size": 7},
        scale_factor=2,
        image_token_id=WORDS - 1,
        pad_token_id=0,
    )
    words = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=1, global_image_token_id=2))
    config = SmolVLAConfig(
        num_steps=STEPS, num_vlm_layers=4, resize_imgs_with_padding=(PIXELS, PIXELS), device="cpu",
        **sizes(joints), **options,
    )  # fmt: skip
    batch = seen(config, joints)
    fetched = {"AutoConfig": language, "AutoProcessor": words}
    fetchers = {name: SimpleNamespace(from_pretrained=lambda _, of=of: of) for name, of in fetched.items()}
    with mock.patch.multiple(smolvlm_with_expert, **fetchers):
        return randomised(SmolVLAPolicy(config)), {"batch": batch}


def chunked(make: Callable[..., Built]) -> Built:
    """In real time: each step is guided to what is left of the actions that were asked for last."""
    policy, call = make(rtc_config=RTCConfig(execution_horizon=6))
    left = torch.randn(SAMPLES, HORIZON - 2, JOINTS)
    return policy, call | {"prev_chunk_left_over": left, "inference_delay": 2, "execution_horizon": 5}


VLAS = {"pi0": pi0, "pi0.5": pi05, "SmolVLA": smolvla}

POLICIES: dict[str, Callable[[], Built]] = {
    "multi_task_dit, DDPM": lambda: multi_task(objective="diffusion", num_inference_steps=STEPS),
    "multi_task_dit, DDIM": lambda: multi_task(
        objective="diffusion", noise_scheduler_type="DDIM", num_inference_steps=STEPS
    ),
    "multi_task_dit, DDPM, rotary": lambda: multi_task(objective="diffusion", num_inference_steps=STEPS, use_rope=True),
    "multi_task_dit, flow, Euler": lambda: multi_task(objective="flow_matching", num_integration_steps=STEPS),
    "multi_task_dit, flow, Runge-Kutta": lambda: multi_task(
        objective="flow_matching", num_integration_steps=STEPS // 4, integration_method="rk4"
    ),
    "diffusion (U-Net)": diffusion,
    "GR00T N1.7, action head": groot,
} | {
    name + also: made
    for name, make in VLAS.items()
    for also, made in (("", make), (", real-time chunking", lambda make=make: chunked(make)))
}
POLICIES["SmolVLA, Aloha"] = lambda: smolvla(14, adapt_to_pi_aloha=True)
