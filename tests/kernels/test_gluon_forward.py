"""Does the Gluon forward agree with the oracle? Needs a Hopper GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from afbs_compile.kernels import gluon_shim, lists, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

if gluon_shim.unusable_triton() is not None:
    pytest.skip(gluon_shim.unusable_triton(), allow_module_level=True)

from afbs_compile.kernels import gluon_forward, gluon_kernel

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 3e-3}
BLOCKS = {"block_m": 128, "block_n": 64}


@pytest.fixture
def hopper():
    """Skips where the kernel cannot run, and says why."""
    reason = gluon_shim.available()
    if reason is not None:
        pytest.skip(reason)


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def policy_rows(modes, window=40, sink=7):
    """Policy tensor with one row a mode."""
    policy = torch.zeros(len(modes), col.COLUMNS)
    policy[:, col.MODE] = torch.tensor(modes)
    policy[:, col.TAU], policy[:, col.WINDOW], policy[:, col.SINK] = 0.5, window, sink
    return policy.cuda()


def normal(seed, *shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


def all_blocks(q, k):
    shape = *q.shape[:2], -(-q.shape[2] // 128), -(-k.shape[2] // 64)
    return torch.ones(shape, dtype=torch.bool, device="cuda")


def relative(x, y):
    """Norm of the difference over the norm of `y`."""
    return ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-12)).item()


def both(q, k, v, keep, policy, **site):
    """Gluon's `(o, lse)` and the oracle's, on the same lists; the oracle in fp32."""
    counts, indices = lists.from_keep(keep)
    got = gluon_forward.forward(q, k, v, counts, indices, policy, **site)
    full = (x.float() for x in (q, k, v))
    return got, reference.forward(*full, counts, indices, policy, **BLOCKS, **site)


def check(got, want, dtype):
    (o, lse), (o_want, lse_want) = got, want
    assert o.dtype == dtype
    assert relative(o, o_want) <= TOLERANCE[dtype]
    torch.testing.assert_close(lse, lse_want, rtol=1e-5, atol=2e-4)


@st.composite
def masks(draw, length_q, length_k):
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 30])) if causal else 0
    return Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50, 200])) if causal else 0)


@st.composite
def problems(draw):
    """q, k, v, which blocks are listed, the policy, and the site's arguments."""
    length_q, length_k = draw(st.integers(1, 1500)), draw(st.integers(1, 1500))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (1, 1, 3), (2, 1, 2), (3, 2, 4)]))
    head_dim = draw(st.sampled_from([64, 128]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    seed = draw(st.integers(0, 1000))
    heads = kv_heads * group
    q = normal(seed, batch, length_q, heads, head_dim, dtype=dtype).transpose(1, 2)
    k = normal(seed + 1, batch, kv_heads, length_k, head_dim, dtype=dtype)
    # one buffer for k and v, as a fused projection makes them
    v = normal(seed + 2, batch, length_k, 2, kv_heads, head_dim, dtype=dtype)[:, :, 1]
    v = v.transpose(1, 2)
    shape = batch, heads, -(-length_q // 128), -(-length_k // 64)
    keep = normal(seed + 3, *shape) < draw(st.sampled_from([-9.0, -0.5, 0.5, 9.0]))
    modes = [draw(st.sampled_from([col.DENSE, col.SPARSE, col.WINDOWED])) for _ in range(heads)]
    policy = policy_rows(
        modes, draw(st.sampled_from([0, 1, 40, 300])), draw(st.sampled_from([0, 7, 70, 200]))
    )
    return q, k, v, keep, policy, {"mask": draw(masks(length_q, length_k)), "scale": 0.1}


@settings(max_examples=60)
@given(problem=problems())
def test_agrees_with_the_oracle(problem, poisoned_empty):
    q, k, v, keep, policy, site = problem
    check(*both(q, k, v, keep, policy, **site), q.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(causal, head_dim, dtype, poisoned_empty):
    """More tiles than processors, so every program draws several."""
    q, k, v = (normal(seed, 2, 8, 2304, head_dim, dtype=dtype) for seed in range(3))
    site = {"mask": Mask(causal), "scale": head_dim**-0.5}
    counts, indices = lists.from_keep(all_blocks(q, k))
    policy = policy_rows([col.DENSE] * 8)
    o, lse = gluon_forward.forward(q, k, v, counts, indices, policy, **site)
    exact = (x.float() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal)
    assert relative(o, dense) <= TOLERANCE[dtype]
    assert lse.isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", [Mask(), Mask(True, 35), Mask(True, 35, 150)])
def test_all_modes_in_one_launch(mask, head_dim, poisoned_empty):
    """Two query heads a kv head, three modes, lists that lack blocks, odd and even counts."""
    q = normal(0, 2, 4, 700, head_dim)
    k, v = (normal(seed, 2, 2, 735, head_dim) for seed in (1, 2))
    policy = policy_rows([col.DENSE, col.WINDOWED, col.SPARSE, col.WINDOWED], 200, 70)
    keep = normal(3, 2, 4, 6, 12) < 0.5
    check(*both(q, k, v, keep, policy, mask=mask, scale=0.1), q.dtype)


def test_the_same_every_time():
    """Many tiles in flight, lists of all lengths: no race changes a bit."""
    q, k, v = (normal(seed, 1, 16, 3000, 128) for seed in range(3))
    keep = normal(3, 1, 16, 24, 47) < torch.linspace(-3, 2, 24, device="cuda")[:, None]
    counts, indices = lists.from_keep(keep)
    policy = policy_rows([col.SPARSE, col.WINDOWED] * 8, 500, 64)
    site = {"mask": Mask(True), "scale": 0.1}
    first = gluon_forward.forward(q, k, v, counts, indices, policy, **site)
    for _ in range(20):
        again = gluon_forward.forward(q, k, v, counts, indices, policy, **site)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_sign_of_the_scale(scale):
    q, k, v = (normal(seed, 1, 1, 200, 64) for seed in range(3))
    policy = policy_rows([col.DENSE])
    check(*both(q, k, v, all_blocks(q, k), policy, mask=Mask(True), scale=scale), q.dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lambda_skips_what_cannot_matter(head_dim, poisoned_empty):
    """Heads with lambda and without in one launch; the far keys weigh 2^-11.5 each, times 1e4."""
    q, k, v = (normal(seed, 1, 3, 2048, head_dim) for seed in range(3))
    q[..., 0], k[..., 0], k[:, :, :1024, 0] = 8.0, 0.0, -8.0
    q[..., 1:] /= 8
    v[:, :, :1024] = 1e4
    policy = policy_rows([col.SPARSE] * 3)
    policy[:, col.LAMBDA] = torch.tensor([-torch.inf, -30.0, -5.0])
    keep = all_blocks(q, k)
    (o, lse), (o_all, lse_all) = both(q, k, v, keep, policy, mask=Mask(), scale=0.125)
    keep[..., :16] = False
    _, (o_near, lse_near) = both(q, k, v, keep, policy, mask=Mask(), scale=0.125)
    assert relative(o_near[:, :2], o_all[:, :2]) > 0.1
    assert relative(o[:, :2], o_all[:, :2]) <= TOLERANCE[q.dtype]
    assert relative(o[:, 2], o_near[:, 2]) <= TOLERANCE[q.dtype]
    torch.testing.assert_close(lse[:, :2], lse_all[:, :2], rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(lse[:, 2], lse_near[:, 2], rtol=1e-5, atol=2e-4)


@settings(max_examples=20)
@given(problem=problems())
def test_a_low_lambda_changes_nothing(problem, poisoned_empty):
    q, k, v, keep, policy, site = problem
    policy[:, col.LAMBDA] = -60.0
    check(*both(q, k, v, keep, policy, **site), q.dtype)


def test_rows_that_see_nothing_are_zero(poisoned_empty):
    q, k, v = (normal(seed, 1, 1, 256, 64) for seed in range(3))
    keep = all_blocks(q, k)
    keep[:, :, 1] = False
    mask = Mask(True, offset=-10)
    (o, lse), _ = both(q, k, v, keep, policy_rows([col.DENSE]), mask=mask, scale=0.2)
    blind = torch.tensor([i < 10 or i >= 128 for i in range(256)], device="cuda")
    assert torch.equal(o[0, 0].abs().sum(-1) == 0, blind)
    assert torch.equal(lse[0, 0] == -torch.inf, blind)


def test_a_call_that_sees_nothing_at_all(poisoned_empty):
    q, k, v = (normal(seed, 1, 2, 150, 128) for seed in range(3))
    mask = Mask(True, offset=-500)
    (o, lse), _ = both(q, k, v, all_blocks(q, k), policy_rows([col.DENSE] * 2), mask=mask, scale=1)
    assert not o.any()
    assert (lse == -torch.inf).all()


def test_nan_in_a_key_stays_where_it_is_seen():
    """Key 140 is NaN: rows before it, and rows whose lists leave its block out, stay finite."""
    q, k, v = (normal(seed, 1, 1, 512, 64) for seed in range(3))
    k[:, :, 140] = torch.nan
    keep = all_blocks(q, k)
    keep[:, :, 2, 2] = False
    site = {"mask": Mask(True), "scale": 0.2}
    got, want = both(q, k, v, keep, policy_rows([col.DENSE]), **site)
    broken = torch.tensor([140 <= i < 256 or i >= 384 for i in range(512)], device="cuda")
    assert torch.equal(got[0][0, 0].isnan().any(-1), broken)
    assert torch.equal(got[1][0, 0].isnan(), broken)
    assert relative(got[0][0, 0, ~broken], want[0][0, 0, ~broken]) <= 3e-3


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("mask", "mode", "hidden"),
    [
        (Mask(True, offset=-50), col.DENSE, [slice(150, 400)]),
        (Mask(True, offset=90, window=40), col.DENSE, [slice(0, 51)]),
        (Mask(False, offset=190), col.WINDOWED, [slice(7, 151)]),
        (Mask(True, offset=190), col.WINDOWED, [slice(7, 151), slice(390, 400)]),
    ],
)
def test_nan_in_a_value_that_no_row_sees_has_no_effect(mask, mode, hidden, head_dim):
    q, k, v = (normal(n, 1, 1, length, head_dim) for n, length in enumerate((200, 400, 400)))
    for span in hidden:
        v[:, :, span] = torch.nan
    site = {"mask": mask, "scale": 0.2}
    keep = all_blocks(q, k)
    got, want = both(q, k, v, keep, policy_rows([mode], window=40, sink=7), **site)
    assert want[0].isfinite().all()
    check(got, want, q.dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_in_a_value_of_the_future(head_dim):
    """The second half of a box, which only later tiles see, is NaN: early tiles stay finite."""
    q, k, v = (normal(seed, 1, 2, 384, head_dim) for seed in range(3))
    v[:, :, 150:] = torch.nan
    site = {"mask": Mask(True, offset=20), "scale": 0.2}
    got, want = both(q, k, v, all_blocks(q, k), policy_rows([col.DENSE] * 2), **site)
    assert want[0][:, :, :128].isfinite().all()
    assert relative(got[0][:, :, :128], want[0][:, :, :128]) <= 3e-3


def test_strides_as_models_make_them():
    """Slices of one fused projection, a sliced length, batch and length swapped."""
    fused = normal(0, 2, 300, 6 * 64)
    q = fused[..., : 4 * 64].view(2, 300, 4, 64).transpose(1, 2)
    k = fused[..., 4 * 64 : 5 * 64].view(2, 300, 1, 64).transpose(1, 2)
    v = normal(1, 600, 2, 1, 64).permute(1, 2, 0, 3)[:, :, ::2]
    policy = policy_rows([col.DENSE] * 4)
    check(*both(q, k, v, all_blocks(q, k), policy, mask=Mask(True), scale=0.2), q.dtype)


def test_output_is_laid_out_as_models_read_it():
    q, k, v = (normal(seed, 2, 2, 150, 64, dtype=torch.float16) for seed in range(3))
    site = {"mask": Mask(), "scale": 0.2}
    (o, lse), _ = both(q, k, v, all_blocks(q, k), policy_rows([col.DENSE] * 2), **site)
    assert o.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32


def test_says_what_it_cannot_read():
    x = normal(0, 1, 2, 128, 128)
    head_last, expanded = x.transpose(2, 3), x[:, :1].expand(1, 2, 128, 128)
    shifted = normal(0, 2 * 128 * 128 + 1)[1:].view(1, 2, 128, 128)
    bad = [x.float(), x[..., :96], head_last, expanded, shifted, x[:, :, :0]]
    for y in bad:
        assert gluon_forward.supported(y, y, y, **BLOCKS) is not None
    assert gluon_forward.supported(x, x, x, block_m=64, block_n=64) is not None
    assert gluon_forward.supported(x, x, x, **BLOCKS) is None
    with pytest.raises(ValueError, match="16 bytes"):
        both(shifted, x, x, all_blocks(x, x), policy_rows([0.0, 0.0]), mask=Mask(), scale=1.0)


def test_captured_without_a_sync_and_not_compiled_again():
    policy = policy_rows([col.DENSE] * 2)

    def attend(length):
        q, k, v = (normal(seed, 1, 2, length, 64) for seed in range(3))
        counts, indices = lists.from_keep(all_blocks(q, k))
        site = {"mask": Mask(True, window=length), "scale": 0.1}
        return lambda: gluon_forward.forward(q, k, v, counts, indices, policy, **site)

    attend(256)()
    kernels = compiled(gluon_kernel.forward_kernel)
    for length in (1, 17, 100, 1000, 4096):
        attend(length)()
    assert compiled(gluon_kernel.forward_kernel) == kernels
    call, graph = attend(1256), torch.cuda.CUDAGraph()
    want = call()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        captured[0].fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured[0], want[0])


def compiled(kernel):
    """Number of variants of a Triton kernel compiled so far on the current device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])
