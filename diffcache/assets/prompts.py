"""Encode prompts for the text-conditional demo model by a fixed table of word vectors, without a download."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffcache.errors import BadOption

LENGTH = 8


class PromptEncoder:
    """An encoder that looks up words in a table made once from MiniLM (``examples/training/build_words.py``).

    The first eight words of a prompt are used. Their order has no effect, because in Flux all text tokens have the same
    position. An unknown word raises an error that lists the nearest known words.

    Args:
        words: The words of the table.
        table: The vector of each word, [words, C].
    """

    def __init__(self, words: Sequence[str], table: Tensor) -> None:
        self.words = tuple(words)
        self.table = table.float()
        self._row = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def load(cls, path: str | Path) -> PromptEncoder:
        """Return the encoder with the words and the table in a safetensors file."""
        with safe_open(path, framework="pt") as file:
            return cls(json.loads(file.metadata()["words"]), file.get_tensor("table"))

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ``prompt_embeds`` [N, 8, C] and ``pooled_prompt_embeds`` [N, C], float32, of N prompts.

        Raises:
            BadOption: If a word is not in the table.
        """
        embeds = torch.zeros(len(prompts), LENGTH, self.table.shape[1])
        for n, prompt in enumerate(prompts):
            for k, word in enumerate(prompt.lower().split()[:LENGTH]):
                embeds[n, k] = self.table[self._find(word)]
        known = (embeds != 0).any(-1).sum(-1, keepdim=True).clamp(min=1)
        return embeds, embeds.sum(1) / known

    def _find(self, word: str) -> int:
        if word not in self._row:
            near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
            hint = f", such as {', '.join(near)}" if near else ""
            raise BadOption("prompt word", word, f"one of the {len(self.words)} words of the demo model{hint}")
        return self._row[word]
