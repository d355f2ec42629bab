"""Does the Triton forward agree with the oracle? On a GPU, or in the interpreter without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import lists, reference, triton_common, triton_forward
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LONGEST = 700 if GPU else 150
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}


def policy_rows(modes, window=40, sink=7):
    """Policy tensor with one row a mode."""
    policy = torch.zeros(len(modes), col.COLUMNS)
    policy[:, col.MODE] = torch.tensor(modes)
    policy[:, col.TAU], policy[:, col.WINDOW], policy[:, col.SINK] = 0.5, window, sink
    return policy.to(DEVICE)


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative(x, y):
    """Norm of the difference over the norm of `y`."""
    return ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-12)).item()


def both(q, k, v, keep, policy, **site):
    """Triton's `(o, lse)` and the oracle's, on the same lists; the oracle in fp32."""
    counts, indices = lists.from_keep(keep)
    got = triton_forward.forward(q, k, v, counts, indices, policy, **site)
    full = (x.float() for x in (q, k, v))
    return got, reference.forward(*full, counts, indices, policy, **site)


def check(got, want, dtype):
    (o, lse), (o_want, lse_want) = got, want
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert relative(o, o_want) <= TOLERANCE[dtype]
    torch.testing.assert_close(
        lse, lse_want, rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 2e-4
    )


@st.composite
def masks(draw, length_q, length_k):
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 30])) if causal else 0
    return Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50])) if causal else 0)


@st.composite
def problems(draw):
    """q, k, v, which blocks are listed, the policy, and the site's arguments."""
    length_q, length_k = draw(st.integers(1, LONGEST)), draw(st.integers(1, LONGEST))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (1, 1, 3), (2, 1, 2), (1, 2, 1)]))
    head_dim = draw(st.sampled_from([32, 64, 80]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    block_m, block_n = draw(st.sampled_from([(16, 32), (32, 16), (64, 64), (128, 64)]))
    seed = draw(st.integers(0, 1000))
    heads = kv_heads * group
    q = normal(seed, batch, length_q, heads, head_dim, dtype=dtype).transpose(1, 2)
    k = normal(seed + 1, batch, kv_heads, length_k, head_dim, dtype=dtype)
    v = normal(seed + 2, batch, kv_heads, head_dim, length_k, dtype=dtype).transpose(2, 3)
    shape = batch, heads, -(-length_q // block_m), -(-length_k // block_n)
    keep = normal(seed + 3, *shape) < draw(st.sampled_from([-0.5, 0.5, 9.0]))
    modes = [draw(st.sampled_from([col.DENSE, col.SPARSE, col.WINDOWED])) for _ in range(heads)]
    policy = policy_rows(
        modes, draw(st.sampled_from([0, 1, 40])), draw(st.sampled_from([0, 7, 70]))
    )
    site = {"mask": draw(masks(length_q, length_k)), "scale": head_dim**-0.5}
    return q, k, v, keep, policy, site | {"block_m": block_m, "block_n": block_n}


def test_runs_where_it_should():
    assert triton_common.interpreted() != GPU, "triton was imported before this module chose"


@settings(max_examples=25 if GPU else 14)
@given(problem=problems())
def test_agrees_with_the_oracle(problem, poisoned_empty):
    q, k, v, keep, policy, site = problem
    check(*both(q, k, v, keep, policy, **site), q.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", [Mask(), Mask(True, 20), Mask(True, 20, 60)])
def test_all_modes_in_one_launch(mask, dtype):
    """Two query heads a kv head, three modes, a list that lacks blocks."""
    q = normal(0, 2, 4, 75, 64, dtype=dtype)
    k, v = (normal(seed, 2, 2, 110, 64, dtype=dtype) for seed in (1, 2))
    policy = policy_rows([col.DENSE, col.WINDOWED, col.SPARSE, col.WINDOWED])
    keep = normal(3, 2, 4, 3, 4) < 1
    site = {"mask": mask, "scale": 0.2, "block_m": 32, "block_n": 32}
    check(*both(q, k, v, keep, policy, **site), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(causal):
    q, k, v = (normal(seed, 1, 2, 100, 64) for seed in range(3))
    site = {"mask": Mask(causal), "scale": 0.125, "block_m": 32, "block_n": 32}
    keep = torch.ones(1, 2, 4, 4, dtype=torch.bool, device=DEVICE)
    (o, _), _ = both(q, k, v, keep, policy_rows([col.DENSE] * 2), **site)
    exact = (x.double() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal)
    assert relative(o, dense) <= 1e-5


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_sign_of_the_scale(scale):
    q, k, v = (normal(seed, 1, 1, 40, 32) for seed in range(3))
    site = {"mask": Mask(True), "scale": scale, "block_m": 16, "block_n": 16}
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    check(*both(q, k, v, keep, policy_rows([col.DENSE]), **site), q.dtype)


def test_rows_that_see_nothing_are_zero(poisoned_empty):
    q, k, v = (normal(seed, 1, 1, 64, 32) for seed in range(3))
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=DEVICE)
    keep[:, :, 1] = False
    site = {"mask": Mask(True, offset=-10), "scale": 0.2, "block_m": 32, "block_n": 32}
    (o, lse), _ = both(q, k, v, keep, policy_rows([col.DENSE]), **site)
    blind = torch.tensor([i < 10 or i >= 32 for i in range(64)], device=DEVICE)
    assert torch.equal(o[0, 0].abs().sum(-1) == 0, blind)
    assert torch.equal(lse[0, 0] == -torch.inf, blind)


def test_nan_in_a_key_stays_where_it_is_seen():
    """Key 40 is NaN: rows before it, and rows whose lists leave its block out, stay finite."""
    q, k, v = (normal(seed, 1, 1, 96, 32) for seed in range(3))
    k[:, :, 40] = torch.nan
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    keep[:, :, 2, 1] = False
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 32, "block_n": 32}
    got, want = both(q, k, v, keep, policy_rows([col.DENSE]), **site)
    broken = torch.tensor([40 <= i < 64 for i in range(96)], device=DEVICE)
    assert torch.equal(got[0][0, 0].isnan().any(-1), broken)
    assert torch.equal(got[1][0, 0].isnan(), broken)
    assert relative(got[0][0, 0, ~broken], want[0][0, 0, ~broken]) <= 1e-5


@pytest.mark.parametrize(
    ("mask", "mode", "hidden"),
    [
        (Mask(True, offset=-24), col.DENSE, slice(40, 96)),
        (Mask(True, offset=90, window=40), col.DENSE, slice(0, 51)),
        (Mask(False, offset=90), col.WINDOWED, slice(7, 51)),
    ],
)
def test_nan_in_a_value_that_no_row_sees_has_no_effect(mask, mode, hidden):
    q, k, v = normal(0, 1, 1, 64, 32), normal(1, 1, 1, 96, 32), normal(2, 1, 1, 96, 32)
    v[:, :, hidden] = torch.nan
    keep = torch.ones(1, 1, 1, 3, dtype=torch.bool, device=DEVICE)
    site = {"mask": mask, "scale": 0.2, "block_m": 64, "block_n": 32}
    got, want = both(q, k, v, keep, policy_rows([mode], window=40, sink=7), **site)
    assert want[0].isfinite().all()
    check(got, want, q.dtype)


def test_windowed_heads_beside_dense_ones():
    """A windowed head is dense attention under its own token mask, the others under the site's."""
    q, k, v = (normal(seed, 1, 3, 120, 32) for seed in range(3))
    policy = policy_rows([col.WINDOWED, col.DENSE, col.SPARSE], window=20, sink=3)
    keep = torch.ones(1, 3, 4, 8, dtype=torch.bool, device=DEVICE)
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 32, "block_n": 16}
    (o, _), _ = both(q, k, v, keep, policy, **site)
    i, j = torch.arange(120, device=DEVICE)[:, None], torch.arange(120, device=DEVICE)
    causal = j <= i
    seen = torch.stack([causal & ((j > i - 20) | (j < 3)), causal, causal])
    exact = (x.double() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*exact, seen, scale=0.2)
    assert relative(o, dense) <= 1e-5


def test_strides_of_any_kind():
    """Last stride 2, an expanded kv head, a sliced length."""
    q = normal(0, 1, 2, 40, 64)[..., ::2]
    k = normal(1, 1, 1, 40, 32).expand(1, 2, 40, 32)
    v = normal(2, 1, 2, 80, 32)[:, :, ::2]
    keep = torch.ones(1, 2, 3, 3, dtype=torch.bool, device=DEVICE)
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 16, "block_n": 16}
    check(*both(q, k, v, keep, policy_rows([col.DENSE] * 2), **site), q.dtype)


def test_output_is_laid_out_as_models_read_it():
    q, k, v = (normal(seed, 2, 2, 20, 32, dtype=torch.float16) for seed in range(3))
    keep = torch.ones(2, 2, 2, 2, dtype=torch.bool, device=DEVICE)
    site = {"mask": Mask(), "scale": 0.2, "block_m": 16, "block_n": 16}
    (o, lse), _ = both(q, k, v, keep, policy_rows([col.DENSE] * 2), **site)
    assert o.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("shared_bytes", [65_536, 101_376, 166_912, 232_448])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("blocks", [(16, 16), (64, 64), (128, 64), (128, 128)])
def test_tiles_fit(shared_bytes, head_dim, itemsize, blocks):
    tile_m, tile_n, _, stages = triton_forward.tiling(head_dim, itemsize, *blocks, shared_bytes)
    assert blocks[0] % tile_m == blocks[1] % tile_n == 0
    assert min(tile_m, tile_n) >= 16
    assert stages >= 1
    assert (tile_m + 2 * stages * tile_n) * head_dim * itemsize <= shared_bytes


@pytest.mark.gpu
def test_captured_without_a_sync_and_not_compiled_again():
    policy = policy_rows([col.DENSE] * 2)

    def attend(length):
        q, k, v = (normal(seed, 1, 2, length, 64, dtype=torch.bfloat16) for seed in range(3))
        keep = torch.ones(1, 2, *[-(-length // 64)] * 2, dtype=torch.bool, device=DEVICE)
        counts, indices = lists.from_keep(keep)
        site = {"mask": Mask(True, window=length), "scale": 0.1, "block_m": 64, "block_n": 64}
        return lambda: triton_forward.forward(q, k, v, counts, indices, policy, **site)

    attend(256)()
    kernels = compiled(triton_forward.forward_kernel)
    for length in (1, 17, 100, 1000):
        attend(length)()
    assert compiled(triton_forward.forward_kernel) == kernels
    call, graph = attend(256), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert torch.equal(captured[0], call()[0])


def compiled(kernel):
    """Number of variants of a Triton kernel compiled so far on the current device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])
