"""Small trained models for the demo and the tests. ``weights/README.md`` names their origin and licence."""

from diffcache.assets.grid import save_grid
from diffcache.assets.models import MODELS, NAMES, About, DemoModel, load
from diffcache.assets.prompts import PromptEncoder

__all__ = ["MODELS", "NAMES", "About", "DemoModel", "PromptEncoder", "load", "save_grid"]
