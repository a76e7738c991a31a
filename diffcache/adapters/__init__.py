"""Where a model can be cached, found from its structure."""

from diffcache.adapters.structure import find_sites, first_norm

__all__ = ["find_sites", "first_norm"]
