"""What stands for the encoders of a pipeline that cannot be given embeddings, and networks that stand elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.parts import HEIGHT, TEXT, TOKENS, seeded


class Words:
    """Stands for a tokenizer: the numbers of a text depend on it alone, and every text has as many."""

    model_max_length = TOKENS

    def __call__(self, texts: str | list[str], **_: Any) -> SimpleNamespace:
        each = [texts] if isinstance(texts, str) else texts
        ids = torch.stack([torch.randint(90, (TOKENS,), generator=seeded(f"words of {one}")) for one in each])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def tokenize(self, _text: str) -> list[str]:
        return []


def reader(kind: str = "CLIPTextModel", width: int = TEXT) -> Callable[[], Any]:
    """A text encoder."""

    def make() -> Any:
        import transformers

        config = transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=width,
        )
        return getattr(transformers, kind)(config)

    return make


def viewer() -> Any:
    """An image encoder."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=HEIGHT,
        patch_size=8,
        projection_dim=TEXT,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def view() -> Any:
    import transformers

    return transformers.CLIPImageProcessor(crop_size={"height": HEIGHT, "width": HEIGHT})
