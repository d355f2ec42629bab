"""Online softmax in registers for the Gluon kernel, and how its weights cross a loop."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from afbs_compile.kernels.gluon_mask import ROWS, STEP


@gluon.jit
def weigh(s, top, total, scale_log2):
    """Online softmax in base 2: weights, new maximum, new sum, factor that shrinks the past."""
    top_new = gl.maximum(top, gl.max(s, 1) * scale_log2)
    p = gl.exp2(gl.fma(s, scale_log2, -top_new[:, None]))
    shrink = gl.exp2(top - top_new)
    own: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    past = total * gl.convert_layout(shrink, own)[:, None]
    return p, top_new, past + partial_sums(p), shrink


@gluon.jit
def partial_sums(p):
    """Sums `[64, 4]` over the columns that each of a row's four threads holds: no exchange."""
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, STEP // 8, 4, 2]), 3), 1)


@gluon.jit
def pack(p, dtype: gl.constexpr):
    """Weights `[64, 128]` rounded to half precision, two neighbours in one int32 `[64, 64]`.

    Loops carry the pairs: carried one by one, each pair costs two permutations a step.
    """
    even, odd = gl.split(gl.reshape(p, [ROWS, STEP // 2, 2]))
    name: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + name + ".f32 $0, $1, $2;", "=r,f,f", [odd, even],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def unpack(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """The half-precision weights `[64, 128]` that `pack` packed, as an operand of P·V."""
    even = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [ROWS, STEP]), layout)
