"""Load the trained text model that comes with the package, and decode with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.assets.text_tasks import MASK, TASKS, VOCABULARY, batch, solved
from diffcache.errors import BadOption, UnknownName

FOLDER = Path(__file__).parent / "weights" / "text"
LENGTHS = (64, 128, 256)  # of a prompt, and of its answer


@dataclass(frozen=True)
class TextModel:
    """A masked diffusion language model and its decoding loop.

    Attributes:
        network: The network, a Llama with bidirectional attention.
    """

    network: nn.Module

    def sample(self, prompt: Tensor, *, block: int = 32, per_step: int = 1, threshold: float | None = None) -> Tensor:
        """Decode answers as long as the prompts. Each step commits the most confident masks of the block in progress.

        Args:
            prompt: int64 [B, n].
            block: The number of positions in a block. Blocks are decoded from left to right.
            per_step: The number of tokens that a step commits in each row.
            threshold: Tokens of at least this probability are committed as well. None for no others.

        Returns:
            int64 [B, 2 n], the prompts and the answers.
        """
        return decode(self.network, prompt, block=block, per_step=per_step, threshold=threshold)


@torch.no_grad()
def decode(
    network: Callable[..., Any],
    prompt: Tensor,
    *,
    block: int = 32,
    per_step: int = 1,
    threshold: float | None = None,
) -> Tensor:
    """Decode answers as long as the prompts, as LLaDA does (arXiv 2502.09992), by confidence and in blocks.

    Args:
        network: Takes ids and returns an output with logits.
        prompt: int64 [B, n].
        block: See ``TextModel.sample``.
        per_step: See ``TextModel.sample``.
        threshold: See ``TextModel.sample``.
    """
    length = prompt.shape[1]
    x = torch.cat([prompt, torch.full_like(prompt, MASK)], 1)
    for begin in range(length, 2 * length, block):
        part = slice(begin, min(begin + block, 2 * length))
        while bool((masked := x[:, part] == MASK).any()):
            logits = network(x).logits[:, part].float()
            logits[..., MASK] = -torch.inf
            confidence, token = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1)
            chosen = torch.zeros_like(masked)
            chosen.scatter_(1, confidence.topk(min(per_step, masked.shape[1]), dim=1).indices, True)
            if threshold is not None:
                chosen |= confidence >= threshold
            x[:, part] = torch.where(chosen & masked, token, x[:, part])
    return x


def load_text() -> TextModel:
    """Return the text model from files inside the package, in float32 on the CPU."""
    from transformers import LlamaForCausalLM  # slow to import, so it is imported here
    from transformers.utils import logging as messages

    settings: Any = messages
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        network: Any = LlamaForCausalLM.from_pretrained(FOLDER)
    finally:
        if shown:
            settings.enable_progress_bar()
    return TextModel(network.float().train(False).requires_grad_(False))


def text_calls(task: str, count: int, *, length: int = 128, batch_size: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Return calls of the decoding loop with ``count`` prompts of one task. Other seeds give other prompts.

    Args:
        task: ``"walk"`` or ``"sudoku"``.
        count: The number of prompts.
        length: The number of tokens of a prompt.
        batch_size: The number of prompts in a call. The last call may have fewer.
        seed: The seed of the generator of prompts.

    Raises:
        UnknownName: There is no such task.
        BadOption: The model was not trained on this length.
    """
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    if length not in LENGTHS:
        raise BadOption("length", length, ", ".join(map(str, LENGTHS)))
    prompts, _ = batch(task, count, length, seed)
    return [{"prompt": torch.from_numpy(prompts[i : i + batch_size])} for i in range(0, count, batch_size)]


def text_of(ids: Tensor | np.ndarray) -> str:
    """Return the text of token ids [n], without the end tokens."""
    return "".join(VOCABULARY[int(i)] for i in ids).replace("[END]", "").replace("[MASK]", "_")


def is_exact(call: Mapping[str, Any], ids: Tensor) -> Sequence[bool]:
    """Return whether each answer is right. The tasks have one right answer for each prompt.

    Args:
        call: The arguments of the decoding loop.
        ids: int64 [B, 2 n], its result.
    """
    length = ids.shape[1] // 2
    return [bool((solved(row[:length].numpy()) == row[length:].numpy()).all()) for row in ids]
