"""Run a pipeline in full and write down its sampling loop."""
