"""Which batch is next on this rank? A batch sampler that balances ranks without talking to them.

Every rank computes the whole epoch from the same numbers (lengths, seed, epoch, and a snapshot of
costs that is taken when an epoch begins), so ranks agree however far their loaders read ahead. Use
it with a plain `DataLoader(dataset, batch_sampler=sampler)`; it knows its rank, so nothing else
may shard the loader.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from afbs_compile.training.epoch import Shape, Step, cuts, laid_out, order
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.assignment import ASSIGNERS
from afbs_compile.tuner.densities import DensityEstimates
from afbs_compile.tuner.step_cost import CostModel
from afbs_compile.tuner.workload import sample_costs, visible_blocks

REMEMBERED = 8  # steps that were laid out lately; a loader asks for each micro-batch apart


class SparsityAwareBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank; each sample once an epoch, equally many batches on every rank."""

    def __init__(
        self,
        lengths: ArrayLike,
        batch_size: int = 1,
        micro_batches: int = 1,
        *,
        world: int | None = None,
        rank: int | None = None,
        sync: str = "step",
        layers: int = 1,
        visible: ArrayLike | None = None,
        densities: DensityEstimates | None = None,
        cost: CostModel | None = None,
        assign: str = "lpt",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        window: int = 1,
    ) -> None:
        """Describe the data and the run.

        Args:
            lengths: Tokens of every sample [N].
            batch_size: Samples of a micro-batch. Costs add up, as in packed batches; a batch that
                is padded costs more, so use 1 there.
            micro_batches: Of a rank in an optimizer step (gradient accumulation).
            world: Data-parallel replicas; by default the size of the process group.
            rank: The number of this replica; by default the process's rank. Tensor- and
                context-parallel peers give the same.
            sync: "step" if ranks wait at the end of a step (DDP with gradient accumulation),
                "micro" if at every micro-batch (FSDP).
            layers: Attention layers of the model.
            visible: Visible blocks of every sample over all layers [N]; by default those of causal
                attention in `layers` layers.
            densities: Running estimates; by default every density is 1.
            cost: Of this kind of device; by default tokens and their square.
            assign: "lpt" or "karmarkar-karp" (better for few samples, and slower); "deal" balances
                nothing, "snake" sorts and deals there and back.
            seed: Of the permutations.
            shuffle: Whether to permute the samples in every epoch.
            drop_last: Whether to leave out what makes no whole global batch.
            window: Global batches that are sorted together, which changes what a step holds.

        Raises:
            ValueError: An argument is out of range, or there are too few samples.
        """
        self.lengths: Floats = np.asarray(lengths, dtype=np.float64)
        self.world = world or (dist.get_world_size() if initialized() else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if initialized() else 0)
        if not 0 <= self.rank < self.world or window < 1 or assign not in ASSIGNERS:
            raise ValueError(
                f"rank is {self.rank} of {self.world}, window {window}, assign {assign!r}: need a "
                f"rank below the world, window ≥ 1 and one of {', '.join(ASSIGNERS)}"
            )
        if self.lengths.ndim != 1 or not (self.lengths > 0).all():
            raise ValueError("lengths need to be one number of tokens above 0 for every sample")
        self.shape = Shape(self.world, batch_size, micro_batches, sync)
        self.batch_size, self.drop_last = None, drop_last  # batches may differ by a sample
        self.layers = layers
        self.visible: Floats = np.asarray(
            layers * visible_blocks(self.lengths) if visible is None else visible, dtype=float
        )
        self.densities = densities or DensityEstimates(np.ones(len(self.lengths)))
        self.cost, self.assign = cost, ASSIGNERS[assign]
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.cuts = cuts(len(self.lengths), self.shape, drop_last)
        self.ends = np.cumsum([cut.micro_batches for cut in self.cuts])
        self.epoch, self.yielded, self.begin_at = 0, 0, 0
        self._begin(self._snapshot())

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[list[int]]:
        """The micro-batches of this rank, from where a loaded state was."""
        begin, self.begin_at = self.begin_at, 0
        self.yielded = begin
        for number in range(begin, len(self)):
            step, micro = self.place(number)
            self.yielded += 1
            yield self.step(step)[self.rank][micro]

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.cuts)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of every rank in a step; fewer in a smaller last one."""
        return self.cuts[step].micro_batches

    def place(self, number: int) -> tuple[int, int]:
        """Step and micro-batch of the micro-batch with this number in the epoch."""
        step = int(np.searchsorted(self.ends, number, side="right"))
        return step, number - int(self.ends[step] - self.cuts[step].micro_batches)

    def step(self, number: int) -> Step:
        """Samples of all ranks in a step: [rank][micro-batch]. No communication."""
        return self._step(number)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, with what is known of densities and costs by now.

        All ranks need to know the same: see `DensityEstimates.commit`. The current epoch's number
        changes nothing, so that a resumed epoch goes on.
        """
        if epoch != self.epoch:
            self.epoch, self.yielded, self.begin_at = epoch, 0, 0
            self._begin(self._snapshot())

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where the epoch is, and all that its batches depend on.

        Args:
            done: Micro-batches of this epoch that the training has used. By default all that were
                handed out, which is too many if a loader reads ahead.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "done": self.yielded if done is None else done,
            "samples": len(self.lengths),
            "micro_batches": self.shape.micro_batches,
            "global_batch": self.shape.samples,
            "snapshot": self.snapshot,
            "densities": self.densities.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was; the next iteration begins there.

        The number of ranks may differ if the global batch has the same size and a step is whole.

        Raises:
            ValueError: The state is of other data, or of another global batch.
        """
        if int(state["samples"]) != len(self.lengths):
            raise ValueError(
                f"the state is of {state['samples']} samples, there are {len(self.lengths)}"
            )
        steps, rest = divmod(int(state["done"]), int(state["micro_batches"]))
        same = int(state["micro_batches"]) == self.shape.micro_batches
        if int(state["global_batch"]) != self.shape.samples or (rest and not same):
            raise ValueError(
                f"the state has global batches of {state['global_batch']} samples and "
                f"{state['micro_batches']} micro-batches, {rest} of them done in a step; "
                f"this run has {self.shape.samples} and {self.shape.micro_batches}: keep ranks × "
                "batch_size × micro_batches and resume at a whole step, or begin the next epoch"
            )
        self.densities.load_state_dict(state["densities"])
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])
        self.begin_at = int(state["done"]) if same else steps * self.shape.micro_batches
        self.yielded = self.begin_at
        self._begin(state["snapshot"])

    def _snapshot(self) -> dict[str, Any]:
        """What the costs of an epoch depend on."""
        known = self.cost is not None and self.cost.ready
        return {
            "cost": self.cost.state_dict() if self.cost and known else None,
            "factor": self.densities.factor.tolist(),
        }

    def _begin(self, snapshot: Mapping[str, Any]) -> None:
        """Make an epoch's costs and order."""
        cost = None
        if snapshot["cost"] is not None:
            cost = CostModel()
            cost.load_state_dict(snapshot["cost"])
        density = self.densities.with_factor(snapshot["factor"])
        self.snapshot = dict(snapshot)
        self.costs = sample_costs(self.lengths, self.visible, density, cost)
        self.order = order(
            self.costs, self.shape, self.seed, self.epoch, self.shuffle, self.window
        )
        self._step = functools.lru_cache(REMEMBERED)(self._laid_out)

    def _laid_out(self, number: int) -> Step:
        """Balance one global batch."""
        cut = self.cuts[number]
        samples = self.order[cut.start : cut.stop]
        return laid_out(samples, self.costs[samples], cut.micro_batches, self.shape, self.assign)


def initialized() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def totals(step: Step, values: Floats) -> Floats:
    """A number of every sample summed by rank and micro-batch [R, M]."""
    micros = [micro for rank in step for micro in rank]
    samples = list(itertools.chain.from_iterable(micros))
    ends = np.cumsum([0, *map(len, micros)])[:-1]
    return np.add.reduceat(values[samples], ends).reshape(len(step), -1)
