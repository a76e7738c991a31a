"""Transformers for pictures, J to Z."""

from __future__ import annotations

from denoisers.tiny import TinyDenoiser

DENOISERS: tuple[TinyDenoiser, ...] = ()

NO_DENOISERS: dict[str, str] = {}
