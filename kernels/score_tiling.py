"""How is the work of block scoring cut? Sub-blocks by selector, tiles by what the kernel holds."""

from typing import NamedTuple

from afbs_compile.kernels.scores import SELECTORS, SUB_BLOCK


def pooled_sizes(selector: str, block_m: int, block_n: int) -> tuple[int, int]:
    """Tokens of a query and of a key sub-block under `selector`.

    Raises:
        ValueError: For an unknown selector.
    """
    if selector not in SELECTORS:
        raise ValueError(f"unknown selector {selector!r}: use one of {', '.join(SELECTORS)}")
    size = SUB_BLOCK.get(selector)
    return (size, size) if size else (block_m, block_n)


class Tiling(NamedTuple):
    """Query sub-rows and key sub-blocks of a tile, warps, pipeline stages, registers a thread."""

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None


def tiling(
    head_dim: int, itemsize: int, fold_m: int, fold_n: int, causal: bool, shared_bytes: int
) -> Tiling:
    """How the score kernel cuts its work.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        itemsize: Bytes of one element of the means.
        fold_m: Sub-rows of a query block: a tile holds whole blocks.
        fold_n: Sub-blocks of a key block: a tile holds four blocks at least.
        causal: Whether later keys are hidden.
        shared_bytes: Shared memory that one program may use, for q and the stages of k.
    """
    if itemsize == 4:
        rows, cols, warps, stages, registers = 32, 32, 8, 2, None
    elif fold_m == 1:  # a row is a whole block: few tiles, and wide ones are read sooner
        rows, cols, warps, stages, registers = 64, 128, 4, 3, None
    elif causal:  # short rows: many small programs
        rows, cols, warps, stages, registers = 64, 64, 4, 3, None
    else:  # two programs a multiprocessor, each with two warpgroups that share k
        rows, cols, warps, stages, registers = 128, 128, 8, 2, 128
    rows = max(rows, fold_m)
    cols = max(cols, 4 * fold_n if fold_n > 1 else 1)
    while cols > max(16, 4 * fold_n) and (rows + 2 * cols) * head_dim * itemsize > shared_bytes:
        cols //= 2
    fitting = (shared_bytes // (head_dim * itemsize) - rows) // cols
    return Tiling(rows, cols, warps, max(1, min(stages, fitting)), registers)
