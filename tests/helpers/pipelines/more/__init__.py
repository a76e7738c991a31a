"""Pipelines that only some tests use: variants, and other ways of calling the same pipelines."""
