"""Are the Gluon backward's gradients those of the oracle? Needs a Hopper GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from afbs_compile.kernels import gluon_shim, lists, on_gpu, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

if gluon_shim.unusable_triton() is not None:
    pytest.skip(gluon_shim.unusable_triton(), allow_module_level=True)

from afbs_compile.kernels import gluon_backward, gluon_dkdv, gluon_dq, gluon_forward

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 3e-3}
NAMES = ("dq", "dk", "dv")
BLOCKS = {"block_m": 128, "block_n": 64}


@pytest.fixture
def hopper():
    """Skips where the kernels cannot run, and says why."""
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


def backward(do, q, k, v, keep, policy, **site):
    """The kernels' gradients, forward included."""
    kept = lists.from_keep(keep)
    o, lse = gluon_forward.forward(q, k, v, *kept, policy, **site)
    return gluon_backward.backward(do, q, k, v, o, lse, *kept, policy, **site, **BLOCKS)


def oracle(do, q, k, v, keep, policy, **site):
    """Autograd through the fp32 oracle."""
    return reference.backward(do, q, k, v, *lists.from_keep(keep), policy, **site, **BLOCKS)


def rows(x):
    """Root mean square of the norms of rows, of those that are not NaN."""
    squares = x.double().pow(2).sum(-1)
    return squares[squares.isfinite()].mean().sqrt().item()


def check(got, want, inputs, scale):
    """Norms of the differences, over those of the gradients or of the terms that cancel in them.

    Where a query sees one key, dq and dk are 0: a difference of two equal numbers.
    """
    do, q, k, v = inputs[:4]
    ds = scale * do.double().norm().item() * rows(v) / q.shape[-1] ** 0.5
    for name, mine, theirs, x, terms in zip(
        NAMES, got, want, (q, k, v), (ds * rows(k), ds * rows(q), 0.0), strict=True
    ):
        assert (mine.dtype, mine.shape) == (x.dtype, x.shape)
        error = (mine.double() - theirs.double()).norm().item()
        size = max(theirs.double().norm().item(), 0.3 * terms, 1e-30)
        assert error / size <= TOLERANCE[x.dtype], name


@st.composite
def masks(draw, length_q, length_k):
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 30])) if causal else 0
    return Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50, 200])) if causal else 0)


@st.composite
def problems(draw):
    """do, q, k, v, which blocks are listed, the policy, and the site's arguments."""
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
    do = normal(seed + 4, batch, heads, length_q, head_dim, dtype=dtype)
    shape = batch, heads, -(-length_q // 128), -(-length_k // 64)
    keep = normal(seed + 3, *shape) < draw(st.sampled_from([-9.0, -0.5, 0.5, 9.0]))
    modes = [draw(st.sampled_from([col.DENSE, col.SPARSE, col.WINDOWED])) for _ in range(heads)]
    policy = policy_rows(
        modes, draw(st.sampled_from([0, 1, 40, 300])), draw(st.sampled_from([0, 7, 70, 200]))
    )
    site = {"mask": draw(masks(length_q, length_k)), "scale": 0.1}
    return (do, q, k, v, keep, policy), site


@settings(max_examples=60)
@given(problem=problems())
def test_agrees_with_the_oracle(problem, poisoned_empty):
    inputs, site = problem
    check(backward(*inputs, **site), oracle(*inputs, **site), inputs, site["scale"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(causal, head_dim, dtype, poisoned_empty):
    """More tiles than processors, so every program of dq draws several."""
    do, q, k, v = (normal(seed, 2, 8, 2304, head_dim, dtype=dtype) for seed in range(4))
    inputs = do, q, k, v, all_blocks(q, k), policy_rows([col.DENSE] * 8)
    site = {"mask": Mask(causal), "scale": head_dim**-0.5}
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    want = torch.autograd.grad(dense, leaves, do.float())
    check(backward(*inputs, **site), want, inputs, site["scale"])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", [Mask(), Mask(True, 35), Mask(True, 35, 150), Mask(True, -70)])
def test_all_modes_in_one_launch(mask, head_dim, poisoned_empty):
    """Two query heads a kv head, three modes, lists that lack blocks, odd and even counts."""
    do, q = normal(4, 2, 4, 700, head_dim), normal(0, 2, 4, 700, head_dim)
    k, v = (normal(seed, 2, 2, 735, head_dim) for seed in (1, 2))
    policy = policy_rows([col.DENSE, col.WINDOWED, col.SPARSE, col.WINDOWED], 200, 70)
    keep = normal(3, 2, 4, 6, 12) < 0.5
    keep[:, 0, 1], keep[:, 2, :, 3] = False, False
    inputs = do, q, k, v, keep, policy
    site = {"mask": mask, "scale": 0.1}
    check(backward(*inputs, **site), oracle(*inputs, **site), inputs, site["scale"])


@pytest.mark.parametrize("mask", [Mask(True, 35, 600), Mask(True, 35), Mask(False, 35)])
def test_windows_longer_than_tiles(mask, poisoned_empty):
    """Both ends of a list need the mask, what lies between does not."""
    do, q = normal(4, 1, 4, 1500, 128), normal(0, 1, 4, 1500, 128)
    k, v = (normal(seed, 1, 2, 1535, 128) for seed in (1, 2))
    policy = policy_rows([col.WINDOWED, col.DENSE, col.WINDOWED, col.SPARSE], 700, 70)
    inputs = do, q, k, v, all_blocks(q, k), policy
    site = {"mask": mask, "scale": 0.1}
    check(backward(*inputs, **site), oracle(*inputs, **site), inputs, site["scale"])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_half_precision_at_size(kv_heads, head_dim):
    do, q = (normal(seed, 1, 4, 2000, head_dim) for seed in (0, 1))
    k, v = (normal(seed, 1, kv_heads, 2000, head_dim) for seed in (2, 3))
    keep = normal(4, 1, 4, 16, 32) < 0
    inputs = do, q, k, v, keep, policy_rows([col.SPARSE] * 3 + [col.WINDOWED], 300, 64)
    site = {"mask": Mask(True), "scale": head_dim**-0.5}
    for name, mine, theirs in zip(
        NAMES, backward(*inputs, **site), oracle(*inputs, **site), strict=True
    ):
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert error.item() <= 3e-3, name


def test_the_same_every_time():
    """Many tiles in flight, lists of all lengths: no race changes a bit."""
    do, q = (normal(seed, 1, 16, 3000, 128) for seed in (0, 1))
    k, v = (normal(seed, 1, 8, 3000, 128) for seed in (2, 3))
    keep = normal(3, 1, 16, 24, 47) < torch.linspace(-3, 2, 24, device="cuda")[:, None]
    policy = policy_rows([col.SPARSE, col.WINDOWED] * 8, 500, 64)
    site = {"mask": Mask(True), "scale": 0.1}
    once = backward(do, q, k, v, keep, policy, **site)
    for _ in range(20):
        again = backward(do, q, k, v, keep, policy, **site)
        assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_what_sees_nothing_or_is_seen_by_nobody_gets_zero(poisoned_empty):
    do, q, k, v = (normal(seed, 1, 1, 300, 128) for seed in range(4))
    keep = all_blocks(q, k)
    keep[:, :, 1], keep[:, :, :, 1] = False, False
    site = {"mask": Mask(True, offset=-10), "scale": 0.2}
    dq, dk, dv = backward(do, q, k, v, keep, policy_rows([col.DENSE]), **site)
    blind = torch.tensor([i < 10 or 128 <= i < 256 for i in range(300)], device="cuda")
    unseen = torch.tensor([j > 289 or 64 <= j < 128 for j in range(300)], device="cuda")
    one_key = torch.arange(300, device="cuda") == 10  # its dq is 0 but for rounding
    assert torch.equal((dq[0, 0].abs().sum(-1) == 0)[~one_key], blind[~one_key])
    assert torch.equal(dv[0, 0].abs().sum(-1) == 0, unseen)
    assert torch.equal(dk[0, 0].abs().sum(-1) == 0, unseen)


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
def test_nan_in_a_key_that_no_row_sees_has_no_effect(mask, mode, hidden, head_dim):
    do, q, k, v = (normal(n, 1, 1, m, head_dim) for n, m in enumerate((200, 200, 400, 400)))
    for span in hidden:
        k[:, :, span] = v[:, :, span] = torch.nan
    inputs = do, q, k, v, all_blocks(q, k), policy_rows([mode], window=40, sink=7)
    clean = do, q, k.nan_to_num(), v.nan_to_num(), *inputs[4:]
    site = {"mask": mask, "scale": 0.2}
    check(backward(*inputs, **site), oracle(*clean, **site), inputs, site["scale"])


def test_strides_as_models_make_them():
    """Slices of one fused projection, a sliced length, one number as do."""
    fused = normal(0, 2, 300, 6 * 64)
    q = fused[..., : 4 * 64].view(2, 300, 4, 64).transpose(1, 2)
    k = fused[..., 4 * 64 : 5 * 64].view(2, 300, 1, 64).transpose(1, 2)
    v = normal(1, 600, 2, 1, 64).permute(1, 2, 0, 3)[:, :, ::2]
    do = normal(2, 1).expand(2, 4, 300, 64)
    inputs = do, q, k, v, all_blocks(q, k), policy_rows([col.DENSE] * 4)
    site = {"mask": Mask(True), "scale": 0.2}
    got = backward(*inputs, **site)
    check(got, oracle(*inputs, **site), inputs, site["scale"])
    assert all(x.transpose(1, 2).is_contiguous() for x in got)


def test_says_what_it_cannot_take():
    x = normal(0, 1, 2, 128, 128)
    assert gluon_backward.supported(x, x, x, scale=0.1, **BLOCKS) is None
    assert gluon_backward.supported(x, x, x, scale=-0.1, **BLOCKS) is not None
    assert gluon_backward.supported(x.float(), x, x, scale=0.1, **BLOCKS) is not None
    with pytest.raises(ValueError, match="positive"):
        gluon_backward.backward(
            x, x, x, x, x, x[..., 0].float(), *lists.from_keep(all_blocks(x, x)),
            policy_rows([col.DENSE] * 2), mask=Mask(), scale=0.0, **BLOCKS,
        )  # fmt: skip


def test_dispatch_takes_it_where_it_fits():
    x = normal(0, 1, 2, 128, 128)
    assert on_gpu.gpu_backward(x, x, x, scale=0.1, **BLOCKS) is gluon_backward.backward
    assert on_gpu.gpu_backward(x, x, x, scale=-0.1, **BLOCKS) is not gluon_backward.backward


def test_captured_without_a_sync_and_not_compiled_again():
    policy = policy_rows([col.DENSE] * 2)

    def gradients(length):
        do, q, k, v = (normal(seed, 1, 2, length, 64) for seed in range(4))
        kept = lists.from_keep(all_blocks(q, k))
        site = {"mask": Mask(True, window=length), "scale": 0.1}
        o, lse = gluon_forward.forward(q, k, v, *kept, policy, **site)
        saved = o, lse, *kept, policy
        return lambda: gluon_backward.backward(do, q, k, v, *saved, **site, **BLOCKS)

    kernels = [gluon_dq.dq_kernel, gluon_dkdv.dkdv_kernel]
    gradients(256)()
    before = [compiled(kernel) for kernel in kernels]
    for length in (1, 17, 100, 1000, 4096):
        gradients(length)()
    assert [compiled(kernel) for kernel in kernels] == before
    call, graph = gradients(1256), torch.cuda.CUDAGraph()
    want = call()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))


def compiled(kernel):
    """Number of variants of a Triton kernel compiled so far on the current device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])
