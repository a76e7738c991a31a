"""Fit the coefficients of equation (1) to recorded runs, and state the fidelity to expect."""

from diffcache.profiling.fitting.fidelity import psnr_db

__all__ = ["psnr_db"]
