"""Transformers for sound."""

from __future__ import annotations

from denoisers.tiny import TinyDenoiser

DENOISERS: tuple[TinyDenoiser, ...] = ()

NO_DENOISERS: dict[str, str] = {}
