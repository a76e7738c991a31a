"""Run a recorded sampling loop without its pipeline: any step, from any state, computed or predicted."""
