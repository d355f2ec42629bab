"""How long did this rank itself work in a step? Its own time, not the time it waited for others.

On a CPU: the processor's time of this process, which stands still in a blocking collective. On a
GPU: between an event at the beginning of the forward pass and one when the gradient of the first
parameter, the last to be made, is there; DDP's wait for the other ranks comes later in the stream.
Events of a step are read when the next one is enqueued, so the device never runs dry. FSDP waits
at every layer, inside this time: there leave clocks out and rely on a profiled cost model.
"""

import math
import time
from typing import Any

import torch
from torch import nn


class StepClock:
    """Seconds of this rank's steps, each known one step later."""

    def __init__(self, model: nn.Module) -> None:
        """Watch a model; with `close` the hook is gone.

        Raises:
            ValueError: No parameter of the model is trained.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter needs a gradient: there is no training to time")
        self.cuda = trained[0].is_cuda
        self.begun: Any = None
        self.ended: Any = None
        self.waiting: tuple[Any, Any] | None = None  # of the step before
        self.hook = trained[0].register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A step begins on this rank."""
        self.begun, self.ended = self._now(), None

    def end(self) -> float:
        """A step has been enqueued; the seconds of the step before it, NaN if there is none."""
        before, self.waiting = self.waiting, None
        if self.begun is not None and self.ended is not None:
            self.waiting = self.begun, self.ended
        self.begun = None
        return math.nan if before is None else self._between(*before)

    def close(self) -> None:
        """Stop watching."""
        self.hook.remove()

    def _mark(self, _: torch.Tensor) -> None:
        """The first parameter has its gradient; of several micro-batches the last counts."""
        if self.begun is not None:
            self.ended = self._now()

    def _now(self) -> Any:
        """A moment of this rank's work."""
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        """Seconds between two moments."""
        if not self.cuda:
            return float(ended - begun)
        ended.synchronize()  # a step ago: it is over, or nearly
        return float(begun.elapsed_time(ended)) / 1e3
