"""What happens around every training step? Plan, set this rank's budgets, time, exchange, learn.

Loads of all ranks are known from the sampler, so planning needs no communication. One scalar a
rank is exchanged if steps are timed, beside the step and one step late; without a clock none is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from afbs_compile.training.clock import StepClock
from afbs_compile.training.exchange import ScalarExchange
from afbs_compile.training.report import Record, StragglerReport
from afbs_compile.training.sampler import SparsityAwareBatchSampler, totals
from afbs_compile.tuner.balance import Plan
from afbs_compile.tuner.controller import SparsityController


class SetBudgets(Protocol):
    """Where budgets go: from the next call on, without a recompile."""

    def __call__(self, budgets: Mapping[str, float], /) -> Any:
        """Let the heads of each site keep this share of their visible blocks, in (0, 1]."""


class Balancer:
    """The life of a balanced training run; every rank has one, and all decide the same."""

    def __init__(
        self,
        sampler: SparsityAwareBatchSampler,
        controller: SparsityController | None = None,
        sites: Sequence[str] = (),
        set_budgets: SetBudgets | None = None,
        exchange: ScalarExchange | None = None,
        clock: StepClock | None = None,
        report: StragglerReport | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            sampler: Its steps are what is planned; its ranks are the controller's replicas.
            controller: None plans nothing: batches alone are balanced.
            sites: Names of the attention sites, in the order of the controller's layers.
            set_budgets: Takes the budgets of this rank, by site.
            exchange: Over which measured times go; by default one where every rank is a replica.
            clock: Times this rank; None observes nothing, and exchanges nothing.
            report: Where every timed step is noted.

        Raises:
            ValueError: The parts do not fit each other.
        """
        if controller and controller.replicas != sampler.world:
            raise ValueError(
                f"the controller has {controller.replicas} replicas, the sampler {sampler.world}"
            )
        layers = len(controller.bounds.base) if controller else 0
        if controller and (set_budgets is None or {len(sites), sampler.layers} != {layers}):
            raise ValueError(
                f"{len(sites)} sites, {sampler.layers} layers of the sampler, {layers} of the "
                "controller: need as many of each, and set_budgets"
            )
        self.sampler, self.controller = sampler, controller
        self.sites, self.set_budgets = list(sites), set_budgets
        self.clock, self.report = clock, report or StragglerReport()
        self.exchange = exchange or (ScalarExchange() if clock else None)
        self.number, self.micro = 0, 0  # of the step that runs
        self.plans: list[Plan] = []  # of its units
        self.waiting: tuple[int, list[Plan]] | None = None  # the step before, not yet timed
        self.timed: tuple[int, list[Plan]] | None = None  # whose scalars are on their way

    def begin_step(self, number: int) -> list[Plan]:
        """Step `number` of the epoch begins: plan it, and set the budgets of its first part."""
        self.settle()
        self.number, self.micro = number, 0
        self.plans = self._planned(number)
        self.begin_micro_batch(0)
        if self.clock:
            self.clock.begin()
        return self.plans

    def begin_micro_batch(self, micro: int) -> None:
        """Set the budgets of a micro-batch; needed where ranks wait at each (`sync="micro"`)."""
        if self.plans and self.set_budgets and micro < len(self.plans):
            budgets = self.plans[micro].budgets[self.sampler.rank].tolist()
            self.set_budgets(dict(zip(self.sites, budgets, strict=True)))

    def end_step(self) -> None:
        """All of the step is enqueued: send the time of the step before."""
        self._note_densities()
        if self.clock is None or self.exchange is None:
            return
        seconds = self.clock.end()
        if self.waiting is not None:
            self.exchange.start(seconds)
            self.timed = self.waiting
        self.waiting = self.number, self.plans

    def settle(self) -> None:
        """Learn from the scalars that were sent."""
        seconds = self.exchange.finish() if self.exchange else None
        if seconds is None or self.timed is None:
            return
        (number, plans), self.timed = self.timed, None
        if self.controller and len(plans) == 1:  # a clock times a step, not its micro-batches
            self.controller.observe(plans[0], seconds)
        self.report.add(Record.of(self.sampler.epoch, number, seconds, plans))

    def next_epoch(self, epoch: int) -> None:
        """Begin an epoch: budgets that were planned count as densities of their samples."""
        if epoch != self.sampler.epoch:
            self.sampler.densities.commit()
            self.sampler.set_epoch(epoch)

    def flush(self) -> None:
        """Time, exchange and learn all steps that are over; every rank has to. Waits."""
        self.settle()
        if self.clock and self.exchange and self.waiting:
            self.exchange.start(self.clock.end())
            self.timed, self.waiting = self.waiting, None
            self.settle()

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """All that batches and budgets depend on; every rank must ask. `done`: see the sampler."""
        self.flush()
        return {
            "sampler": self.sampler.state_dict(done),
            "controller": self.controller.state_dict() if self.controller else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], resize: bool = False) -> None:
        """Go on where a state was; `resize` as in the controller's.

        Raises:
            ValueError: It is of another kind of run.
        """
        if (state["controller"] is None) != (self.controller is None):
            raise ValueError("the state and this run differ in whether there is a controller")
        self.sampler.load_state_dict(state["sampler"])
        if self.controller:
            self.controller.load_state_dict(state["controller"], resize)
        self.plans, self.waiting, self.timed = [], None, None

    def _planned(self, number: int) -> list[Plan]:
        """Plans of the step's units: one, or one for every micro-batch."""
        if self.controller is None:
            return []
        step, layers = self.sampler.step(number), len(self.sites)
        tokens, visible = (totals(step, x) for x in (self.sampler.lengths, self.sampler.visible))
        if self.sampler.shape.sync == "step":
            tokens, visible = tokens.sum(1, keepdims=True), visible.sum(1, keepdims=True)
        return [
            self.controller.plan(tokens[:, unit], visible[:, unit] / layers, unit)
            for unit in range(tokens.shape[1])
        ]

    def _note_densities(self) -> None:
        """The budgets of all ranks are known here: so are the densities of all samples."""
        for rank, micros in enumerate(self.sampler.step(self.number) if self.plans else ()):
            for micro, samples in enumerate(micros):
                plan = self.plans[min(micro, len(self.plans) - 1)]
                self.sampler.densities.observe(samples, float(plan.budgets[rank].mean()))
