"""Which pairs of a tile does a data mask show, and what does a bias add to them? On a GPU.

The functions that kernels call; the mask as they take it is `kernels.triton_mask.Parts`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from afbs_compile.kernels import bias as biases
from afbs_compile.kernels.triton_common import LOG2E

STRIDES = ["stride_keys", "stride_qs", "stride_ks"]
MASK_STRIDES = [*STRIDES, "stride_eb", "stride_eh", "stride_eq", "stride_ek"]
BIAS_STRIDES = ["stride_bb", "stride_bh", "stride_bq", "stride_bk"]
LOG2_E = tl.constexpr(LOG2E)
HIDDEN = tl.constexpr(biases.HIDDEN)


@triton.jit
def of_queries(x, TURNED: tl.constexpr):
    """What queries have, over the pairs; `TURNED` ones lie as `[keys, queries]`."""
    if TURNED:
        return x[None, :]
    else:  # noqa: RET505  a compile-time branch
        return x[:, None]


@triton.jit
def of_keys(x, TURNED: tl.constexpr):
    """What keys have, over the pairs."""
    if TURNED:
        return x[:, None]
    else:  # noqa: RET505  a compile-time branch
        return x[None, :]


@triton.jit
def data_seen(
    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, stride_keys, stride_qs, stride_ks,
    stride_eb, stride_eh, stride_eq, stride_ek, b, h, i, j, i_mask, j_mask,
    HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ELEMENTS: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """Which of the pairs (i, j) the data mask shows; false outside `i_mask` and `j_mask`."""
    seen = of_queries(i_mask, TURNED) & of_keys(j_mask, TURNED)
    if HAS_KEYS:
        seen &= of_keys(tl.load(KEYS + b * stride_keys + j, j_mask, 0), TURNED) != 0
    if HAS_SEGMENTS:
        own = tl.load(Q_SEGMENTS + b * stride_qs + i, i_mask, 0)
        other = tl.load(K_SEGMENTS + b * stride_ks + j, j_mask, 0)
        seen &= of_queries(own, TURNED) == of_keys(other, TURNED)
    if HAS_ELEMENTS:
        rows = b * stride_eb + h * stride_eh + of_queries(i.to(tl.int64), TURNED) * stride_eq
        at = ELEMENTS + rows + of_keys(j.to(tl.int64), TURNED) * stride_ek
        seen &= tl.load(at, seen, 0) != 0
    return seen


@triton.jit
def bias_tile(
    BIAS, stride_bb, stride_bh, stride_bq, stride_bk, b, h, i, j, seen,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """What is added to the scores of the pairs (i, j), fp32; −inf where they are not seen."""
    rows = b * stride_bb + h * stride_bh + of_queries(i.to(tl.int64), TURNED) * stride_bq
    at = BIAS + rows + of_keys(j.to(tl.int64), TURNED) * stride_bk
    return tl.load(at, seen, -float("inf")).to(tl.float32)


@triton.jit
def above_hidden(x):
    """A difference of scores, at least `HIDDEN`: times log2(e) the lowest would be −inf."""
    return tl.where(x < HIDDEN, HIDDEN, x)
