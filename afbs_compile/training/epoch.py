"""Which samples of an epoch go to which rank and micro-batch, step by step? Numbers only.

The order is a permutation by seed and epoch, cut into global batches; inside one, samples are
balanced over ranks and then over micro-batches (SparseBalance, arXiv 2604.13847), so no sample
moves to another step. With a look-ahead window, samples of several global batches are sorted by
cost first: steps become more even, and their composition another one.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.assignment import Assign, members

SYNCS = ("step", "micro")
Step = list[list[list[int]]]  # samples of [rank][micro-batch]


@dataclass(frozen=True, slots=True)
class Shape:
    """How a global batch is laid out.

    Attributes:
        world: Data-parallel ranks.
        batch_size: Samples of a micro-batch.
        micro_batches: Of a rank in a step (gradient accumulation).
        sync: When ranks wait for each other: at the end of a "step", or of every "micro"-batch.
    """

    world: int
    batch_size: int
    micro_batches: int = 1
    sync: str = "step"

    def __post_init__(self) -> None:
        if min(self.world, self.batch_size, self.micro_batches) < 1 or self.sync not in SYNCS:
            raise ValueError(
                f"world is {self.world}, batch_size {self.batch_size}, micro_batches "
                f"{self.micro_batches}, sync {self.sync!r}: need 1 or more and one of {SYNCS}"
            )

    @property
    def samples(self) -> int:
        """Of a global batch."""
        return self.world * self.batch_size * self.micro_batches


@dataclass(frozen=True, slots=True)
class Cut:
    """One global batch: where it lies in the epoch's order, and its micro-batches a rank."""

    start: int
    stop: int
    micro_batches: int


def cuts(samples: int, shape: Shape, drop_last: bool) -> list[Cut]:
    """The global batches of an epoch; every rank has as many micro-batches as every other.

    What is left after the last whole global batch makes a smaller one, in which two micro-batches
    differ by one sample at most; fewer samples than ranks join the global batch before.

    Raises:
        ValueError: There is no sample for some rank.
    """
    whole, rest = divmod(samples, shape.samples)
    found = [
        Cut(n * shape.samples, (n + 1) * shape.samples, shape.micro_batches) for n in range(whole)
    ]
    if drop_last or not rest:
        pass
    elif rest >= shape.world:
        micro = min(-(-rest // (shape.world * shape.batch_size)), rest // shape.world)
        found.append(Cut(samples - rest, samples, micro))
    elif found:
        found[-1] = Cut(found[-1].start, samples, shape.micro_batches)
    if not found:
        raise ValueError(
            f"{samples} samples are too few for {shape.world} ranks: no rank may be idle "
            f"({shape.samples} samples make a global batch)"
        )
    return found


def order(
    costs: Floats, shape: Shape, seed: int, epoch: int, shuffle: bool = True, window: int = 1
) -> Ints:
    """The samples in the order of an epoch; equal on every rank.

    Args:
        costs: Of every sample [N].
        shape: Of a global batch.
        seed: Of the run.
        epoch: Its number.
        shuffle: Whether to permute.
        window: Global batches that are sorted together; 1 sorts nothing.
    """
    rng = np.random.default_rng([seed, epoch])
    result = rng.permutation(len(costs)) if shuffle else np.arange(len(costs))
    span = window * shape.samples
    for start in range(0, len(costs) - shape.samples, span) if window > 1 else ():
        part = result[start : start + span]
        part = part[: len(part) - len(part) % shape.samples]  # the tail stays what chance made it
        groups = part[np.argsort(-costs[part], kind="stable")].reshape(-1, shape.samples)
        result[start : start + len(part)] = groups[rng.permutation(len(groups))].ravel()
    return np.asarray(result, dtype=np.int64)


def laid_out(samples: Ints, costs: Floats, micro: int, shape: Shape, assign: Assign) -> Step:
    """The samples of a global batch by rank and micro-batch, as many in each, to within one.

    Args:
        samples: Numbers of the samples [n].
        costs: Of these samples [n].
        micro: Micro-batches of a rank.
        shape: Of a global batch.
        assign: Balances.
    """
    if shape.sync == "step":
        ranks = split(samples, costs, shape.world, assign)
        return [[part.tolist() for part, _ in split(*rank, micro, assign)] for rank in ranks]
    down = np.argsort(-costs, kind="stable")  # alike samples run side by side
    groups = [(samples[g], costs[g]) for g in np.array_split(down, micro)]
    columns = [split(*group, shape.world, assign) for group in groups]
    return [[column[rank][0].tolist() for column in columns] for rank in range(shape.world)]


def split(samples: Ints, costs: Floats, bins: int, assign: Assign) -> list[tuple[Ints, Floats]]:
    """Samples and costs of every bin."""
    groups = members(assign(costs, bins, True), bins)
    return [(samples[group], costs[group]) for group in groups]
