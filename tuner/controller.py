"""How do budgets follow what is measured, step after step, without swinging? Plan, then observe.

`plan` predicts; `observe` compares with the clock. A replica's slowness is its measured over its
predicted time, an exponential mean in logarithms, relative to the median replica. Budgets do not
enter it, so a wrong estimate dies out by (1 − gain) a step. The cost model learns from replicas
that took about as long as was expected of them: a fault must not look like a cost of blocks. A
unit keeps its pressure while it would end near the target (hysteresis). Everything follows from
the arguments alone: peers that give the same numbers decide the same.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.balance import ANCHORS, Plan, Work, plan
from afbs_compile.tuner.budget_bounds import Bounds
from afbs_compile.tuner.step_cost import CostModel

GAIN = 0.2  # of one step in a replica's slowness: a fault halves in 4 steps
CLIP = 4.0  # one step makes a replica look at most so much slower or faster than predicted
NOISE = 0.03  # a slowness so near to 1 (in logarithms) is noise of the clock
SCATTER = 0.3  # of times around their expectation, before any was seen
SCATTER_GAIN = 0.1
OUTLIER = 4.0  # a time so many scatters off its expectation tells nothing of costs


class SparsityController:
    """Budgets for the units of `replicas` data-parallel replicas, one unit each at a time."""

    def __init__(
        self,
        bounds: Bounds,
        cost: CostModel,
        replicas: int,
        anchor: str = "mean",
        deadband: float = 0.02,
        gain: float = GAIN,
    ) -> None:
        """Begin with replicas that are equally fast.

        Args:
            bounds: Of the layers' budgets.
            cost: Predicts; it learns from `observe`.
            replicas: Data-parallel replicas. Tensor- and context-parallel ranks of one replica are
                one: they give the same numbers and take the same budgets.
            anchor: "mean", "min" or "max"; "max" only fills bubbles: no unit shrinks.
            deadband: Near enough to the target, as a share of it.
            gain: Weight of one step in a replica's slowness, in (0, 1].

        Raises:
            ValueError: An argument is out of range.
        """
        if anchor not in ANCHORS:
            raise ValueError(f"anchor is {anchor!r}; choose of {', '.join(ANCHORS)}")
        if replicas < 1 or not 0.0 < gain <= 1.0 or not 0.0 <= deadband < 1.0:
            raise ValueError(
                f"replicas is {replicas}, gain {gain}, deadband {deadband}: need 1 or more, "
                "(0, 1] and [0, 1)"
            )
        self.bounds, self.cost, self.anchor = bounds, cost, anchor
        self.replicas, self.deadband, self.gain = replicas, deadband, gain
        self.log_slowness: Floats = np.zeros(replicas)
        self.scatter = SCATTER  # median |log time − log expected time|, running
        self.compared = 0  # steps whose times were compared with what was expected
        self.held: dict[int, Floats] = {}  # pressures by group
        self.missing = np.zeros(replicas, dtype=np.int64)  # times that were no number

    @property
    def slowness(self) -> Floats:
        """How much slower each replica is than the median one [R]; noise is left out.

        A running mean with gain 0.2 scatters by a third of what single times do.
        """
        centred = self.log_slowness - np.median(self.log_slowness)
        beyond = np.sign(centred) * np.maximum(np.abs(centred) - max(NOISE, self.scatter), 0.0)
        return np.asarray(np.exp(beyond))

    @property
    def margin(self) -> float:
        """How far below the target growing stops: what the latest of R normal errors is late by.

        The largest of R errors is near σ·√(2 ln R), and σ is 1.48 times their median size.
        """
        if not self.compared:
            return 0.0
        late = np.sqrt(2.0 * np.log(self.replicas)) * 1.48 * self.scatter
        return 1.0 - float(np.exp(-late))

    def plan(self, tokens: ArrayLike, visible: ArrayLike, group: int = 0) -> Plan:
        """Budgets for one unit of every replica; the units wait for each other.

        Args:
            tokens: Tokens of every unit [R].
            visible: Visible blocks of every unit and layer [R, L], or [R] if layers are alike.
            group: Which of several such sets in a step, as the number of a micro-batch.

        Raises:
            ValueError: The shapes do not match the replicas and layers.
        """
        work = Work.of(tokens, visible, len(self.bounds.base), self.slowness_for(tokens))
        held = self.held.get(group)
        found = plan(work, self.bounds, self.cost, self.anchor, held, self.deadband, self.margin)
        self.held[group] = found.pressure
        return found

    def observe(self, made: Plan, seconds: ArrayLike) -> None:
        """Tell how long the units of a plan took [R]; NaN where nobody knows.

        Raises:
            ValueError: There is not one time for every replica.
        """
        work = made.work
        t = np.asarray(seconds, dtype=np.float64)
        if t.shape != work.tokens.shape:
            raise ValueError(f"{t.shape} times for {len(work.tokens)} replicas: give one each")
        good = np.isfinite(t) & (t > 0.0)
        self.missing += ~good
        blocks, slowness = work.blocks(made.budgets), self.slowness
        if self.cost.ready and good.any():
            expected = self.cost.predict(work.tokens, blocks)
            good[good] = self._compare(t[good], expected[good], good)
        self.cost.observe(work.tokens[good], blocks[good], (t / slowness)[good])

    def slowness_for(self, tokens: ArrayLike) -> Floats:
        """The slowness of the units' replicas.

        Raises:
            ValueError: There is not one unit for every replica.
        """
        if np.shape(tokens) != (self.replicas,):
            raise ValueError(
                f"{np.shape(tokens)} units for {self.replicas} replicas: give one each; after a "
                "change of the world size make a new controller and load its state with resize"
            )
        return self.slowness

    def state_dict(self) -> dict[str, Any]:
        """Everything that later plans depend on, as numbers, strings and lists."""
        return {
            "replicas": self.replicas,
            "layers": len(self.bounds.base),
            "log_slowness": self.log_slowness.tolist(),
            "scatter": self.scatter,
            "compared": self.compared,
            "held": {str(group): held.tolist() for group, held in self.held.items()},
            "missing": self.missing.tolist(),
            "cost": self.cost.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], resize: bool = False) -> None:
        """Take a state over: plans go on exactly as they would have.

        Args:
            state: Of `state_dict`.
            resize: Whether another number of replicas is welcome: the cost model is then taken,
                and what is known of single replicas is dropped.

        Raises:
            ValueError: The state is damaged, or of other layers or replicas.
        """
        if int(state["layers"]) != len(self.bounds.base):
            raise ValueError(
                f"the state has {state['layers']} layers, the bounds {len(self.bounds.base)}"
            )
        same = int(state["replicas"]) == self.replicas
        if not (same or resize):
            raise ValueError(
                f"the state is of {state['replicas']} replicas, this run has {self.replicas}: "
                "load it with resize=True to keep the cost model and forget single replicas"
            )
        slowness = np.asarray(state["log_slowness"], dtype=np.float64)
        held = {int(g): np.asarray(p, dtype=np.float64) for g, p in state["held"].items()}
        if not all(np.isfinite(x).all() for x in (slowness, *held.values())):
            raise ValueError("the state of a controller holds what is no finite number")
        self.cost.load_state_dict(state["cost"])
        self.log_slowness = slowness if same else np.zeros(self.replicas)
        self.scatter, self.compared = float(state["scatter"]), int(state["compared"])
        self.held = held if same else {}
        self.missing = np.asarray(state["missing"]) if same else np.zeros(self.replicas, int)

    def _compare(self, seconds: Floats, expected: Floats, known: Bools) -> Bools:
        """Move slowness and scatter by the times of `known` replicas; which ones tell of costs."""
        self.compared += 1
        seen = np.log(seconds / np.maximum(expected, np.finfo(float).tiny))
        seen = np.clip(seen - np.median(seen), -np.log(CLIP), np.log(CLIP))
        before = self.log_slowness[known]
        surprise = np.abs(seen - (before - np.median(before)))
        usual = surprise <= max(OUTLIER * self.scatter, NOISE)
        middle = min(float(np.median(surprise)), 2.0 * self.scatter)
        self.scatter = max(self.scatter + SCATTER_GAIN * (middle - self.scatter), NOISE / 3)
        self.log_slowness[known] += self.gain * (seen - before)
        return np.asarray(usual)
