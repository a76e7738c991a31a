"""Formulas that turn a history into a guess."""

from diffcache.predictors.linear import predict

__all__ = ["predict"]
