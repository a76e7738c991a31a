"""Tiny language models that decode masks, with random weights, and loops of users around them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

MASK, VOCABULARY = 0, 20
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def decoder(kind: type = LlamaForCausalLM) -> Any:
    """Return a bidirectional decoder with attention far from uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    config.is_causal = False
    config.mask_token_id = MASK
    torch.manual_seed(0)
    return kind(config).eval()


class BlockCausal(LlamaForCausalLM):
    """A decoder in which a position attends to its own block and to earlier blocks, as in block diffusion.

    Its forward takes a mask of keys [B, N], like LLaDA2's, and makes the mask of queries and keys itself. The engine
    passes a mask of the query rows in place of the mask of keys.
    """

    block = 8

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        size = input_ids.shape[1] if past_key_values is None else past_key_values.get_mask_sizes(0, 0)[0]
        allowed = position_ids[:, None, :, None] // self.block >= torch.arange(size) // self.block
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None, None].bool() if attention_mask.ndim == 2 else attention_mask)
        return super().forward(
            input_ids, attention_mask=allowed, position_ids=position_ids, **{CACHE: past_key_values}, **kwargs
        )


class Rotary(nn.Module):
    """Rotates queries and keys by their index, as in LLaDA."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated queries and keys, [B, heads, n, head_dim]."""
        half = q.shape[-1] // 2
        angles = torch.arange(k.shape[2])[:, None] / 100 ** (torch.arange(half) / half)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

        def turned(x: Tensor) -> Tensor:
            first = k.shape[2] - x.shape[2]
            turned = x * cos[first:] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[first:]
            return turned.to(x.dtype)

        return turned(q), turned(k)


class LLaDABlock(nn.Module):
    """A block built like LLaDA's: its attention takes no positions and no cache of transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.attn_out = nn.LayerNorm(width), nn.Linear(width, width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.ff = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.rotary_emb = Rotary()

    def _scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, [B, n, width]."""
        normed = self.attn_norm(x)
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part(normed).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotary_emb(q, k)
        attended = self._scaled_dot_product_attention(q, k, v, attn_mask=None)
        x = x + self.attn_out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.ff(x)


class LLaDALike(nn.Module):
    """A network with the interface of ``LLaDAModelLM``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(mask_token_id=MASK, model_type="llada")
        self.wte = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(LLaDABlock(32, 4) for _ in range(3))
        self.ff_out = nn.Linear(32, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.ff_out

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return the logits."""
        assert not use_cache
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutputWithPast(logits=4 * self.ff_out(x))


def prompts(rows: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    """Return int64 [rows, length], without masks."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(
    model: Any,
    prompt: Tensor,
    answer: int = 16,
    block: int = 8,
    per_step: int = 1,
    mask: Tensor | None = None,
    shift: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Decode block by block, the most confident positions first, as LLaDA's own loop does.

    Args:
        model: The decoder.
        prompt: int64 [B, P].
        answer: The number of masks.
        block: The length of a block.
        per_step: The number of tokens that a step commits in each row.
        mask: The attention mask.
        shift: Whether the logits at position j - 1 decode position j, as in Dream.

    Returns:
        The tokens, int64 [B, P + answer], and the logits of every step.
    """
    x = torch.cat([prompt, torch.full((len(prompt), answer), MASK)], 1)
    seen = []
    for start in range(prompt.shape[1], x.shape[1], block):
        while (x[:, start : start + block] == MASK).any():
            logits = model(x, attention_mask=mask).logits
            seen.append(logits.clone())
            if shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            logits[..., MASK] = -torch.inf  # a loop may write into the logits
            confidence, token = logits.softmax(-1).max(-1)
            open_ = torch.zeros_like(x, dtype=torch.bool)
            open_[:, start : start + block] = x[:, start : start + block] == MASK
            best = confidence.masked_fill(~open_, -1).topk(per_step, 1).indices
            x.scatter_(1, best, token.gather(1, best))
    return x, seen
