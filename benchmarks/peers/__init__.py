"""Other people's caches, run by their own packages on the demo models."""
