"""Modular diffusers pipelines: the progress bar belongs to a block, which other pipelines may share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from diffcache.host.inspection import is_pipeline, looping_blocks
from diffcache.host.kinds._kind import LoopWatch
from diffcache.host.kinds.pipeline import Bar, Pipeline, PipelineWatch
from diffcache.patch import Undo, layer

if TYPE_CHECKING:
    from diffcache.host.watcher import LoopWatcher


class Modular(Pipeline):
    """A modular diffusers pipeline."""

    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` is a pipeline whose blocks have the sampling loop."""
        return is_pipeline(value) and bool(looping_blocks(value))

    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        """Return a watch on the bars and steps of the looping blocks."""
        return ModularWatch(watcher)


class ModularWatch(PipelineWatch):
    """Watches the bar of a block, which is the sampling loop if a step shows that this pipeline runs the block."""

    def attach(self) -> Iterator[Undo]:
        """Wrap the progress bar and the step of every looping block, and the pipeline's own bar if it has one."""
        if hasattr(self.host, "progress_bar"):
            yield from super().attach()
        for block in looping_blocks(self.host):
            yield layer(block, "progress_bar", self.progress_bar, copies=True)
            yield layer(block, "loop_step", self._loop_step, copies=True)

    def entered(self, bar: Bar) -> None:
        """Open the loop if the pipeline has its own bar. Else wait for a step: another pipeline may run the block."""
        if hasattr(self.host, "progress_bar"):
            bar.begin()
        else:
            self.local.bar = bar

    def left(self) -> None:
        """Stop waiting."""
        self.local.bar = None

    def _loop_step(self, inner: Callable[..., Any], components: Any, *args: Any, **kwargs: Any) -> Any:
        """Open the loop at its first step.

        A step without a time is a chunk that contains the sampling loop, which may have no bar.
        """
        bar: Bar | None = getattr(self.local, "bar", None)
        own, chunk = components is self.host, "t" not in kwargs
        if bar is not None and own and not chunk:
            bar.begin()
            self.local.bar = None
        result = inner(components, *args, **kwargs)
        if own and chunk and not getattr(self.local, "seen", False):
            self.watcher.no_loop()
        return result


KIND = Modular()
