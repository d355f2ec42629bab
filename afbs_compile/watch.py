"""Which calls of a running program are measured beyond the one that tuned?

With `calibration_calls` n, the first n of a length bucket. While a bucket is watched its calls
take the slow path, afterwards nothing is left of it in the fast one. Inputs that an earlier
process measured count. Policies that the user gave are used as they are.
"""

from dataclasses import dataclass, field

from afbs_compile.policy import Tuning

Slot = tuple[tuple[int, ...], int]  # `id` of every weight, and a length bucket


@dataclass(slots=True)
class Watch:
    """The buckets whose calls are still measured.

    Attributes:
        calls: How many of each are, the one that tuned included.
        open: What serves each watched bucket.
        ahead: Those whose next call was measured already, when the graph was compiled.
    """

    calls: int
    open: dict[Slot, Tuning] = field(default_factory=dict)
    ahead: set[Slot] = field(default_factory=set)

    def note(self, slot: Slot, tuning: Tuning | None, ahead: bool = False) -> None:
        """A bucket runs by this tuning from now on; `ahead` of the call that it was made with."""
        self.open.pop(slot, None)
        sparse = tuning and any(s.decision == "sparse" for s in tuning.sites.values())
        if tuning is None or not sparse or len(tuning.inputs) >= self.calls:
            return
        self.open[slot] = tuning
        if ahead:
            self.ahead.add(slot)

    def due(self, slot: Slot) -> Tuning | None:
        """What serves a bucket, if its present call is to be measured."""
        if slot in self.ahead:
            self.ahead.discard(slot)
            return None
        return self.open.get(slot)

    def forget(self, weights: tuple[int, ...]) -> None:
        """Some weights are gone, or have a policy of the user's."""
        for slot in [slot for slot in self.open if slot[0] == weights]:
            del self.open[slot]
            self.ahead.discard(slot)
