"""The counts of the work of one canvas."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Counts:
    """The work of one canvas.

    Attributes:
        forwards: The number of forwards that the loop asked for.
        computed: The number of positions computed, over all rows and forwards. Rows padded to the longest count.
        full: The number of positions that the model without a cache computes.
        projected: The number of positions with logits that were computed, over all rows and forwards.
        refreshes: The number of forwards that computed every position.
        repeated: The number of forwards that were not run, because no input had changed since the last one.
        shares: The share of the positions that each forward computed, in order.
    """

    forwards: int = 0
    computed: int = 0
    full: int = 0
    projected: int = 0
    refreshes: int = 0
    repeated: int = 0
    shares: tuple[float, ...] = ()

    def after(self, computed: int, full: int, projected: int, *, ran: bool) -> Counts:
        """Return the counts after one more forward.

        Args:
            computed: The number of positions that it computed.
            full: The number of positions of the canvas.
            projected: The number of positions with new logits.
            ran: Whether the network ran.
        """
        return replace(
            self,
            forwards=self.forwards + 1,
            computed=self.computed + computed,
            full=self.full + full,
            projected=self.projected + projected,
            refreshes=self.refreshes + (ran and computed == full),
            repeated=self.repeated + (not ran),
            shares=(*self.shares, computed / full),
        )
