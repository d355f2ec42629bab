"""FlashAttention-4 (`pip install flash-attn-4`) on block lists of 128 x 128 tokens.

Written for 4.0.0b36: `flash_attn_func(..., block_sparse_tensors=BlockSparseTensorsTorch(...))`
takes counts and indices of blocks that need the mask, and of those that do not. On Hopper a key
block is a tile of the kernel, so that 128 is what it is tuned for.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from afbs_compile.bench.baselines import Call, Notes, Unavailable, fastest, full_blocks, tried
from afbs_compile.bench.problems import Problem
from afbs_compile.kernels.lists import from_keep
from afbs_compile.versions import version

BLOCK = 128


@functools.cache
def package() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """`flash_attn_func`, `BlockSparseTensorsTorch` and a causal `mask_mod`.

    Raises:
        Unavailable: It is not installed, or it or what it needs cannot be imported.
    """
    if version("flash-attn-4") is None:
        raise Unavailable("flash-attn-4 is not installed")
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
        cute = importlib.import_module("cutlass.cute")
    except Exception as error:
        raise Unavailable(f"flash-attn-4 {version('flash-attn-4')}: {error}") from error
    return interface.flash_attn_func, sparsity.BlockSparseTensorsTorch, cute.jit(causal_pairs)


def causal_pairs(b: Any, h: Any, i: Any, j: Any, seqlen_info: Any, aux: Any) -> Any:
    """A `mask_mod`: query i sees key j."""
    return j <= i


def call(
    problem: Problem, keep: Tensor, notes: Notes, like: Tensor
) -> tuple[Call | None, str | None]:
    """FlashAttention-4 on the blocks `keep` `[1, H, NQ, NK]`, and how it masks the diagonal.

    A causal call has two ways, `causal=True` and a `mask_mod` for the blocks on the diagonal
    alone; the faster one that is right is taken.
    """
    try:
        attend, tensors, causal_mod = package()
    except Unavailable as error:
        notes(f"FlashAttention-4 left out: {error}")
        return None, None
    full = full_blocks(problem, BLOCK)
    lists = tensors(*from_keep(keep & ~full), *from_keep(keep & full), block_size=(BLOCK, BLOCK))
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    ways: dict[str, dict[str, Any]] = {"full": {}}
    if problem.shape.causal:
        ways = {"mask_mod": {"mask_mod": causal_mod}, "causal": {"causal": True}}
    calls = {}
    for way, options in ways.items():

        def run(options: dict[str, Any] = options) -> Tensor:
            o, _ = attend(q, k, v, block_sparse_tensors=lists, **options)
            out: Tensor = o.transpose(1, 2)
            return out

        name = f"FlashAttention-4 ({way}) {problem.shape}"
        if checked := tried(name, run, notes, like):
            calls[way] = checked
    if not calls:
        return None, None
    best = fastest(calls)
    return calls[best], best
