"""More transformers for videos."""

from __future__ import annotations

from pipelines.tiny import Tiny

PIPELINES: tuple[Tiny, ...] = ()
