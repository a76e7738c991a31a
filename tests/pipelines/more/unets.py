"""More U-Nets, and what is put into them."""

from __future__ import annotations

from pipelines.tiny import Tiny

PIPELINES: tuple[Tiny, ...] = ()
