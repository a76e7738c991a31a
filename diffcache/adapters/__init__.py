"""Where a model can be cached, found from its structure."""

from diffcache.adapters.structure import DEEP_STACK, deep_branch, find_sites, first_norm

__all__ = ["DEEP_STACK", "deep_branch", "find_sites", "first_norm"]
