"""More audio."""

from __future__ import annotations

from pipelines.tiny import Tiny

PIPELINES: tuple[Tiny, ...] = ()
