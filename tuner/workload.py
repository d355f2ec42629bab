"""What does a sample cost? Tokens and kept blocks from its length and its expected density."""

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.step_cost import CostModel

BLOCK_M, BLOCK_N = 128, 64  # of the kernels on a GPU; 64 and 64 on a CPU
DENSE_TOKENS = 20_000.0  # dense attention over so many tokens costs as much as all else of a layer


def visible_blocks(lengths: ArrayLike, block_m: int = BLOCK_M, block_n: int = BLOCK_N) -> Floats:
    """Blocks that causal attention over one sequence visits when dense [N], of one head.

    Query block i sees ⌈min((i + 1)·block_m, length) / block_n⌉ key blocks.

    Raises:
        ValueError: `block_m` is no multiple of `block_n`.
    """
    if block_n < 1 or block_m % block_n:
        raise ValueError(f"block_m is {block_m}, need a multiple of block_n, {block_n}")
    length = np.asarray(lengths, dtype=np.int64)
    rows = -(-length // block_m)  # query blocks, the last one maybe shorter
    before = (block_m // block_n) * (rows * (rows - 1) // 2)
    return np.asarray(before + -(-length // block_n) * (rows > 0), dtype=np.float64)


def sample_costs(
    lengths: ArrayLike, visible: ArrayLike, density: ArrayLike, cost: CostModel | None
) -> Floats:
    """Seconds of every sample [N], or proportional to them while no cost is known.

    Args:
        lengths: Tokens [N].
        visible: Visible blocks of all layers [N].
        density: Expected share of them that is kept [N].
        cost: Of the device. Its constant c belongs to a unit of work, not to a sample.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    if cost is not None and cost.ready:
        a, b, _ = cost.coefficients
        return np.asarray(a * tokens + b * np.asarray(visible) * np.asarray(density))
    return np.asarray(tokens + np.asarray(density) * tokens**2 / DENSE_TOKENS)
