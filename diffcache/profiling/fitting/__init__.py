"""Fit the coefficients of equation (1) to recorded runs, and state the fidelity to expect."""
