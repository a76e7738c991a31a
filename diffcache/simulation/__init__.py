"""Simulate the accelerated loop on a profile, with numpy. No network is called."""

from diffcache.simulation.simulator import ANCHORS, RIDGE, Simulator

__all__ = ["ANCHORS", "RIDGE", "Simulator"]
