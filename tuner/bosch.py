"""Which heads can live with a sliding window? BOSCH, arXiv 2604.05942: a search in three stages.

1. `probes`: what does windowing cost in each layer, from top to bottom? If curvature foresees what
   choices cost, it is asked instead of the model.
2. `ratios`: how many heads of each layer, so that all together are exactly as many as asked for?
3. Layers of the same share form a group; from the easiest group to the hardest, a solver looks for
   better heads within it. What is left of the budget goes to exchanges among all layers, which the
   paper does not have: they undo what stage 2 got wrong.

Deterministic by seed; whoever keeps the losses can stop and resume it anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner import nomad, ratios
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.finals import FINALISTS, decided
from afbs_compile.tuner.foresight import Foresight
from afbs_compile.tuner.heads import Bits, Impossible, Layout, lowest, with_counts
from afbs_compile.tuner.probes import cascade
from afbs_compile.tuner.relative import geometric
from afbs_compile.tuner.solvers import SOLVERS, Solver, Task
from afbs_compile.tuner.surrogate import fit
from afbs_compile.tuner.tally import Objective, OnBest, Stop, Tally, silent

STAGES = ("probes", "ratios", "groups", "exchange")
PROBING = 0.1  # of the budget for stage 1, or one choice a layer
ONE_EACH = 0.2  # of the budget: if those are more, stage 1 is left out
GROUPED = 0.2  # of what is left then, for the groups; the rest is for exchanges
WIDEST = 48  # bits of a group: direct search gets lost in more


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What is searched, and how.

    Attributes:
        layout: What the bits are.
        ratio: Share of the bits to set; met exactly (`Layout.share`).
        budget: Bit strings that may be evaluated.
        prior: Expected harm of every bit [N], of any scale; None for no idea.
        others: More of them. The one whose own choice costs least becomes the prior.
        foresight: What is known of the loss beside losses; None for nothing.
        seed: Of all chance.
        solver: Of `SOLVERS`, or one of your own.
        stages: Those to go through.
        levels: Windowed groups that stage 2 may give a layer; None for all.
    """

    layout: Layout
    ratio: float
    budget: int
    prior: Floats | None = None
    seed: int = 0
    solver: str | Solver = "lns"
    stages: Sequence[str] = STAGES
    levels: Sequence[int] | None = None
    others: Sequence[Floats] = ()
    foresight: Foresight | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is evaluated."""
        self.layout.share(self.ratio)
        if self.budget < 1:
            raise Impossible(f"budget is {self.budget}; needed: at least 1 evaluation")
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise Impossible(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
        if isinstance(self.solver, str) and self.solver not in SOLVERS:
            raise Impossible(f"no solver {self.solver!r}; there are {', '.join(SOLVERS)}")
        if self.solver == "nomad":
            nomad.require()
        size = self.layout.size
        for shape in (list(prior.shape) for prior in self.priors):
            if shape != [size]:
                raise Impossible(f"the prior has shape {shape}; needed: [{size}]")
        flat = np.zeros(self.layout.layers)
        ratios.adapted(flat, self.layout, self.ratio, self.levels)

    @property
    def priors(self) -> list[Floats]:
        """All rankings; none without a prior."""
        return [] if self.prior is None else [self.prior, *self.others]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        bits: The best choice, with exactly the asked number set [N].
        loss: Its loss on the objective; inf if nothing was evaluated.
        evaluations: Bit strings that were evaluated.
        stages: Evaluations by stage.
        history: (evaluations, loss) at every improvement.
        cost: What stage 1 found a layer to cost [L], or None.
        complete: Whether the search ended by itself.
    """

    bits: Bits
    loss: float
    evaluations: int
    stages: dict[str, int]
    history: tuple[tuple[int, float], ...]
    cost: Floats | None
    complete: bool


def search(
    objective: Objective,
    wanted: Search,
    on_best: OnBest = silent,
    validate: Objective | None = None,
) -> Found:
    """The best choice that the budget suffices for.

    Args:
        objective: Losses of a batch of choices; may raise `Stop`.
        wanted: What to search.
        on_best: Told after every batch.
        validate: Losses on held-out inputs, which say when to have stopped; of the same budget.

    Raises:
        Impossible: The ratio or the levels cannot be met.
    """
    reserved = min(FINALISTS, wanted.budget // 2) if validate else 0
    left, share = wanted.budget - reserved, wanted.layout.share(wanted.ratio)
    tally = Tally(objective, share, left, on_best)
    walk = Walk(wanted, tally, np.random.default_rng(wanted.seed))
    bits, loss, stages = None, np.inf, tally.stages
    try:
        walk.run()
        if validate and reserved and np.isfinite(tally.least):
            bits, loss, stages["finals"] = decided(tally, validate, reserved, walk.begun)
        complete = True
    except Stop:
        complete = False
    if bits is None:
        loss, bits = tally.least, walk.first(walk.prior) if tally.best is None else tally.best
    history = tuple(tally.history)
    return Found(bits, loss, sum(stages.values()), stages, history, walk.cost, complete)


class Walk:
    """One search on its way through the stages."""

    def __init__(self, wanted: Search, tally: Tally, rng: np.random.Generator) -> None:
        """Begin."""
        self.wanted, self.tally, self.rng, self.layout = wanted, tally, rng, wanted.layout
        self.solver = SOLVERS[wanted.solver] if isinstance(wanted.solver, str) else wanted.solver
        self.prior = np.zeros(self.layout.size) if wanted.prior is None else wanted.prior
        self.cost: Floats | None = None
        self.every = np.arange(self.layout.size)
        self.begun: list[Bits] = []  # what the priors alone choose

    def first(self, prior: Floats) -> Bits:
        """The choice that stages 1 and 2 do not help: equal shares, by a prior."""
        layout = self.layout
        cost = np.bincount(layout.layer, prior, layout.layers) / np.array(layout.groups)
        counts = ratios.adapted(cost, self.layout, self.wanted.ratio, self.wanted.levels)
        return with_counts(prior, self.layout, counts)

    def run(self) -> None:
        """All stages."""
        bits = self.begin()
        if bits.all() or not bits.any() or self.tally.left < 1:
            return
        self.calibrate(bits)
        if "probes" in self.wanted.stages:
            self.probe()
        counts = self.layout.counts(bits)
        if "ratios" in self.wanted.stages:
            bits, counts = self.adapt(bits)
        if "groups" in self.wanted.stages:
            bits = self.group(bits, counts)
        if "exchange" in self.wanted.stages:
            self.tally.stage = "exchange"
            self.solve(bits, self.every, self.tally.left)

    def begin(self) -> Bits:
        """Evaluate what each prior alone would choose, with and without regard to layers.

        And where swaps lead from there that need no evaluation.
        """
        self.tally.stage = "start"
        count, size = self.tally.count, self.layout.size
        tried = [
            (prior, bits)
            for prior in self.wanted.priors or [self.prior]
            for bits in (self.first(prior), lowest(prior, self.every, count, size))
        ]
        self.begun = [bits for _, bits in tried]
        losses = self.tally(self.begun)
        if foresight := self.wanted.foresight:
            known = [b for b, x in zip(self.begun, losses, strict=True) if np.isfinite(x)]
            view = foresight.plain(known[:1])
            led = [(prior, view.descent(bits, self.every, size)) for prior, bits in tried]
            losses += self.tally([bits for _, bits in led])
            tried += led
        self.prior, bits = tried[int(np.argmin(losses))]
        return bits

    def calibrate(self, bits: Bits) -> None:
        """Put the prior into the units of the loss: the first choice costs what it was found to.

        Without a prior all harms are equal.
        """
        (dense, loss) = self.tally([np.zeros_like(bits), bits])
        harm = np.maximum(self.prior - self.prior.min(), 0.0) + 1e-3 * np.ptp(self.prior)
        if not harm.any():
            harm = np.ones(self.layout.size)
        rise = loss - dense if np.isfinite(loss - dense) else 0.0
        self.prior = harm * max(rise, 1e-9) / harm[bits].sum()

    def probe(self) -> None:
        """Stage 1."""
        self.tally.stage = "probes"
        if foresight := self.wanted.foresight:
            alone = np.array([self.layout.layer == n for n in range(self.layout.layers)])
            self.cost = geometric(foresight.by_form(alone))
            return
        budget, layers = self.wanted.budget, self.layout.layers
        each = max(int(PROBING * budget) // layers, int(layers <= ONE_EACH * budget))
        if each:
            found = cascade(self.tally, self.layout, self.wanted.ratio, self.prior, each, self.rng)
            self.cost = found.cost

    def adapt(self, bits: Bits) -> tuple[Bits, Ints]:
        """Stage 2; the better one of its choice and the one so far."""
        self.tally.stage = "ratios"
        strings, losses = self.tally.evidence()
        harm = fit(strings, losses, self.layout, self.prior, bits).harms()
        by_layer = np.bincount(self.layout.layer, harm, self.layout.layers).astype(np.float64)
        cost = by_layer if self.cost is None else self.cost
        counts = ratios.adapted(cost, self.layout, self.wanted.ratio, self.wanted.levels)
        choice = with_counts(harm, self.layout, counts)
        self.tally([choice])
        return choice, counts

    def group(self, bits: Bits, counts: Ints) -> Bits:
        """Stage 3: groups of layers with equal shares, from the easiest to the hardest."""
        self.tally.stage = "groups"
        groups = list(self.groups(counts))
        share = GROUPED if "exchange" in self.wanted.stages else 1.0
        budget, total = int(share * self.tally.left), sum(len(group) for group in groups)
        for group in groups:
            bits = self.solve(bits, group, budget * len(group) // total)
        return bits

    def groups(self, counts: Ints) -> Iterator[Ints]:
        """The bits of every group that leaves a choice, at most `WIDEST` each."""
        shares = counts / np.array(self.layout.groups)
        cost = self.cost if self.cost is not None else np.zeros(self.layout.layers)
        inner = sorted(set(shares[(shares > 0) & (shares < 1)]), reverse=True)
        order = sorted(inner, key=lambda share: float(cost[shares == share].mean()))
        for share in order:
            members: list[Ints] = []
            for layer in np.flatnonzero(shares == share):
                if sum(map(len, members)) + self.layout.groups[layer] > WIDEST and members:
                    yield np.concatenate(members)
                    members = []
                members.append(self.layout.bits_of(int(layer)))
            yield np.concatenate(members)

    def solve(self, bits: Bits, free: Ints, budget: int) -> Bits:
        """Let the solver improve some bits."""
        if budget < 1 or not 0 < bits[free].sum() < len(free):
            return bits
        task = Task(
            self.tally,
            self.layout,
            self.prior,
            bits,
            free,
            budget,
            self.rng,
            self.wanted.foresight,
        )
        return self.solver(task)
