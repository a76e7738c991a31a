"""Fit the coefficients of equation (1) to recorded runs, and state the fidelity to expect."""

from diffcache.profiling.fitting.drift_tables import fit_drift
from diffcache.profiling.fitting.fidelity import psnr_db
from diffcache.profiling.fitting.fit import Fit, replayed_psnr_db

__all__ = ["Fit", "fit_drift", "psnr_db", "replayed_psnr_db"]
