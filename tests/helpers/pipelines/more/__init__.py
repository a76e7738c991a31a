"""Pipelines beside those that every test is tried on: relatives, and other ways of calling the same."""
