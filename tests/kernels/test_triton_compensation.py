"""Do the Triton kernels take tangents in as the oracle does? In the interpreter without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import lists, reference, triton_compensation
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LONGEST = 700 if GPU else 150
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ATTENTION = {"mask": Mask(True), "scale": 0.3, "block_m": 32, "block_n": 16}


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative(x, y):
    """Norm of the difference over the norm of `y`."""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12)).item()


def rows(modes, window=40):
    policy = torch.zeros(len(modes), col.COLUMNS)
    policy[:, col.MODE], policy[:, col.WINDOW] = torch.tensor(modes), window
    return policy.to(DEVICE)


@st.composite
def problems(draw):
    """q, k, v, which blocks are listed, the policy, and the site's arguments."""
    length_q, length_k = draw(st.integers(1, LONGEST)), draw(st.integers(1, LONGEST))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (1, 1, 3), (2, 1, 2), (1, 2, 1)]))
    head_dim, dtype = draw(st.sampled_from([32, 64, 80])), draw(st.sampled_from(list(TOLERANCE)))
    block_m, block_n = draw(st.sampled_from([(16, 32), (32, 16), (64, 64), (128, 64)]))
    seed, heads = draw(st.integers(0, 1000)), kv_heads * group
    q = normal(seed, batch, length_q, heads, head_dim, dtype=dtype).transpose(1, 2)
    k = normal(seed + 1, batch, kv_heads, length_k, head_dim, dtype=dtype)
    v = normal(seed + 2, batch, kv_heads, head_dim, length_k, dtype=dtype).transpose(2, 3)
    shape = batch, heads, -(-length_q // block_m), -(-length_k // block_n)
    keep = normal(seed + 3, *shape) < draw(st.sampled_from([-9.0, -0.5, 0.5, 9.0]))
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 60])) if causal else 0
    mask = Mask(causal, offset, draw(st.sampled_from([0, 0, 50])) if causal else 0)
    scale = draw(st.sampled_from([head_dim**-0.5, -0.2]))
    policy = rows([draw(st.sampled_from([col.SPARSE, col.WINDOWED])) for _ in range(heads)])
    return (q, k, v), keep, policy, {
        "mask": mask, "scale": scale, "block_m": block_m, "block_n": block_n
    }  # fmt: skip


def both(tensors, keep, policy, site, with_tangents):
    """Ours, from what the forward gives, and the oracle's."""
    listed = lists.from_keep(keep)
    o, lse = reference.forward(*tensors, *listed, policy, **site)
    o, lse = triton_compensation.compensate(o, lse, *tensors, *listed, policy, **site)
    return (o, lse), with_tangents(*tensors, *listed, policy, **site)


@settings(max_examples=25 if GPU else 20)
@given(problem=problems())
def test_agrees_with_the_oracle(problem, with_tangents, poisoned_empty):
    (o, lse), (want, want_lse) = both(*problem, with_tangents)
    dtype = problem[0][0].dtype
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert relative(o, want) <= TOLERANCE[dtype]
    tolerance = 2e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(lse, want_lse.float(), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_dropped_nothing_stay_as_they_are_to_the_bit(dtype, with_tangents):
    q, k, v = (normal(seed, 1, 2, 128, 32, dtype=dtype) for seed in range(3))
    keep = torch.ones(1, 2, 4, 8, dtype=torch.bool, device=DEVICE)
    keep[:, 1, 2, 1:3] = False
    listed, policy = lists.from_keep(keep), rows([col.SPARSE] * 2)
    o, lse = reference.forward(q, k, v, *listed, policy, **ATTENTION)
    got, got_lse = triton_compensation.compensate(
        o.clone(), lse.clone(), q, k, v, *listed, policy, **ATTENTION
    )
    changed = torch.zeros(1, 2, 128, dtype=torch.bool, device=DEVICE)
    changed[:, 1, 64:96] = True
    assert torch.equal((got != o).any(-1), changed)
    assert torch.equal(got_lse != lse, changed)


def test_nan_in_a_block_that_nobody_dropped_is_not_read(with_tangents):
    """Key block 1 is kept by all, block 5 and the end are hidden from the rows that drop."""
    q, k, v = (normal(seed, 1, 1, 90, 32) for seed in range(3))
    keep = torch.ones(1, 1, 3, 6, dtype=torch.bool, device=DEVICE)
    keep[:, :, 1, 0] = keep[:, :, 2, 2] = False
    listed, policy = lists.from_keep(keep), rows([col.SPARSE])
    o, lse = reference.forward(q, k, v, *listed, policy, **ATTENTION)
    want = triton_compensation.compensate(
        o.clone(), lse.clone(), q, k, v, *listed, policy, **ATTENTION
    )
    for x in (k, v):
        x[:, :, 16:32] = x[:, :, 48:] = torch.nan
    got = triton_compensation.compensate(o, lse, q, k, v, *listed, policy, **ATTENTION)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_chunks_do_not_matter(monkeypatch):
    q, k, v = (normal(seed, 2, 2, 150, 32) for seed in range(3))
    keep = normal(3, 2, 2, 5, 10) < -0.5
    listed, policy = lists.from_keep(keep), rows([col.SPARSE] * 2)
    o, lse = reference.forward(q, k, v, *listed, policy, **ATTENTION)
    rest = q, k, v, *listed, policy
    want = triton_compensation.compensate(o.clone(), lse.clone(), *rest, **ATTENTION)
    monkeypatch.setattr(triton_compensation, "CHUNK_BYTES", 1)
    got = triton_compensation.compensate(o, lse, *rest, **ATTENTION)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(-400, 400), st.sampled_from([16, 64]),
    st.sampled_from([16, 64]), st.integers(1, 1 << 24),
)  # fmt: skip
def test_chunks_reach_all_that_can_be_dropped(length_q, length_k, offset, block_m, block_n, most):
    site = {"length_q": length_q, "length_k": length_k, "block_m": block_m, "block_n": block_n}
    blocks_q, blocks_k = -(-length_q // block_m), -(-length_k // block_n)
    nothing = lists.from_keep(torch.zeros(1, 1, blocks_q, blocks_k, dtype=torch.bool))
    mask = Mask(True, offset)
    drop = triton_compensation.dropped_blocks(
        *nothing, rows([col.SPARSE]).cpu(), mask=mask, **site
    )
    q = torch.empty(1, 1, length_q, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_compensation, "CHUNK_BYTES", most)
        found = triton_compensation.chunks(blocks_q, blocks_k, mask, q, block_m, block_n)
    covered = torch.zeros_like(drop)
    for first, chunk, reach in found:
        assert not covered[:, :, first : first + chunk].any()
        covered[:, :, first : first + chunk, :reach] = True
    assert not (drop & ~covered).any()
