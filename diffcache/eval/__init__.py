"""Measure accelerated pipelines against the full run: fidelity, distributions, alignment, seconds, memory."""
