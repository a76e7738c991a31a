"""Tiny language models that decode masks, with random weights, and loops of users around them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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
