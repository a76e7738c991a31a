"""Simulate the accelerated loop on a profile, with numpy. No network is called."""

from diffcache.simulation.simulator import ANCHORS, RIDGE, Simulator
from diffcache.simulation.staleness import chances, drifted, stalest

__all__ = ["ANCHORS", "RIDGE", "Simulator", "chances", "drifted", "stalest"]
