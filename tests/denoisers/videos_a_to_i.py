"""Transformers for video, A to I."""

from __future__ import annotations

from denoisers.tiny import TinyDenoiser

DENOISERS: tuple[TinyDenoiser, ...] = ()

NO_DENOISERS: dict[str, str] = {}
