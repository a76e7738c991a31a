"""More of Flux, Qwen-Image, Chroma and their kin."""

from __future__ import annotations

from pipelines.tiny import Tiny

PIPELINES: tuple[Tiny, ...] = ()
