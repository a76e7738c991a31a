"""The accelerated loop, simulated on a profile with numpy: no network is called."""

from diffcache.simulation.simulator import ANCHORS, RIDGE, Simulator

__all__ = ["ANCHORS", "RIDGE", "Simulator"]
