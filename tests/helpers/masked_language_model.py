"""A host of a package that diffcache does not know: a masked diffusion language model with a decoding loop.

It has neither components nor a noise scheduler nor a progress bar. Its state is token ids, its network takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcache.host import Clock, Kind, LoopWatch, LoopWatcher, Parameters, Traits, parameters_of
from diffcache.patch import Undo, layer

MASK, WORDS, WIDTH = 0, 11, 16


class Block(nn.Module):
    """Bidirectional attention and a feed-forward, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.ff = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(hidden_states, hidden_states, hidden_states, need_weights=False)[0]
        return hidden_states + torch.tanh(self.ff(hidden_states))


class LanguageModel(nn.Module):
    """Token ids [B, N] to logits [B, N, WORDS]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Masked(Kind):
    """Decoders of masked language models: each call of ``generate`` is a loop, each forward a step."""

    traits = Traits(returns="state", metrics=("state",), steps_argument="steps")
    allowed = "a masked language model with a decoder"
    example = 'calls = [{"prompt": prompt, "steps": 8} for prompt in prompts]'

    def recognises(self, value: Any) -> bool:
        return isinstance(value, Decoder)

    def denoisers(self, host: Any) -> dict[str, nn.Module]:
        return {"model": host.model}

    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        return MaskedWatch(watcher)

    def arguments(self, host: Any) -> Parameters | None:
        return parameters_of(host.generate)

    def steps_asked(self, host: Any, call: Mapping[str, Any]) -> int | None:
        return int(call.get("steps", 8))

    def iterations(self, host: Any, call: Mapping[str, Any]) -> int | None:
        return self.steps_asked(host, call)

    def parts(self, host: Any) -> Mapping[str, Any]:
        return {"model": host.model}


class MaskedWatch(LoopWatch):
    """Opens the loop when ``generate`` begins. Each forward is a step."""

    def attach(self) -> Iterator[Undo]:
        yield layer(self.host, "generate", self._generate)

    def _generate(self, inner: Callable[..., Any], prompt: Tensor, steps: int = 8) -> Any:
        self.watcher.open(Clock(torch.linspace(1, 0, steps + 1)[:-1]), 0)
        try:
            result = inner(prompt, steps)
            run = self.watcher.run
            if run is not None:
                run.result = result
            return result
        finally:
            self.watcher.close()


class Decoder:
    """Reveals the most confident tokens first (LLaDA)."""

    DIFFCACHE_KIND = Masked()

    def __init__(self, model: nn.Module, length: int = 8) -> None:
        self.model, self.length = model, length

    def __call__(self, **call: Any) -> Tensor:
        return self.generate(**call)

    @torch.no_grad()
    def generate(self, prompt: Tensor, steps: int = 8) -> Tensor:
        x = torch.cat([prompt, prompt.new_full((len(prompt), self.length), MASK)], dim=1)
        for step in range(steps):
            confidence, words = self.model(x)[..., 1:].softmax(-1).max(-1)
            confidence = confidence.masked_fill(x != MASK, -1)
            masked = int((x[0] == MASK).sum())
            chosen = confidence.topk(masked - masked * (steps - step - 1) // (steps - step), dim=1).indices
            x = x.scatter(1, chosen, words.gather(1, chosen) + 1)
        return x
