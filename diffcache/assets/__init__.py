"""The small trained models that the demo and the tests run on (``MODELS.md`` beside the weights tells their origin)."""

from diffcache.assets.grid import save_grid
from diffcache.assets.prompts import PromptEncoder

__all__ = ["PromptEncoder", "save_grid"]
