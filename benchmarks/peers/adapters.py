"""All peers: ``PEERS``. A further one is a line in the file of its package."""

from __future__ import annotations

from peers import cache_dit_peers, diffusers_peers
from peers.peer import Peer

PEERS: tuple[Peer, ...] = (*cache_dit_peers.PEERS, *diffusers_peers.PEERS)
