"""Are the gradients those of autograd? On a GPU, or in the interpreter without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import boxes, lists, reference, triton_backward, triton_forward
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask, token_visible

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LONGEST = 700 if GPU else 130
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
NAMES = ("dq", "dk", "dv")


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
    return ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-9)).item()


def backward(do, q, k, v, keep, policy, **site):
    """The kernels' gradients, forward included."""
    counts, indices = lists.from_keep(keep)
    o, lse = triton_forward.forward(q, k, v, counts, indices, policy, **site)
    return triton_backward.backward(do, q, k, v, o, lse, counts, indices, policy, **site)


def oracle(do, q, k, v, keep, policy, **site):
    """Autograd through the fp32 oracle."""
    return reference.backward(do, q, k, v, *lists.from_keep(keep), policy, **site)


def dense(do, q, k, v, keep, policy, *, mask, scale, block_m, block_n):
    """Autograd through masked dense attention in float64, written from its definition."""
    leaves = q, k, v = [x.detach().double().requires_grad_() for x in (q, k, v)]
    group, length_q, length_k = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    i, j = torch.arange(length_q, device=DEVICE), torch.arange(length_k, device=DEVICE)
    kept = keep.repeat_interleave(block_m, 2).repeat_interleave(block_n, 3)
    seen = token_visible(mask, policy, i, j) & kept[:, :, :length_q, :length_k]
    scores = scale * q @ k.repeat_interleave(group, 1).transpose(2, 3)
    p = scores.masked_fill(~seen, -1e300).softmax(-1).masked_fill(~seen, 0)
    return torch.autograd.grad(p @ v.repeat_interleave(group, 1), leaves, do.double())


def rows(x):
    """Root mean square of the norms of rows."""
    return x.nan_to_num().double().pow(2).sum(-1).mean().sqrt().item()


def check(got, want, inputs, scale):
    """Norms of the differences, over those of the gradients or of the terms that cancel in them.

    Where a query sees one key, dq and dk are 0: a difference of two equal numbers.
    """
    do, q, k, v = inputs[:4]
    ds = abs(scale) * do.double().norm().item() * rows(v) / q.shape[-1] ** 0.5
    for mine, theirs, x, terms in zip(
        got, want, (q, k, v), (ds * rows(k), ds * rows(q), 0.0), strict=True
    ):
        assert (mine.dtype, mine.shape) == (x.dtype, x.shape)
        error = (mine.double() - theirs.double()).norm().item()
        size = max(theirs.double().norm().item(), 0.3 * terms, 1e-30)
        assert error / size <= TOLERANCE[x.dtype]


@st.composite
def masks(draw, length_q, length_k):
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 30])) if causal else 0
    return Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50])) if causal else 0)


@st.composite
def problems(draw):
    """do, q, k, v, which blocks are listed, the policy, and the site's arguments."""
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
    do = normal(seed + 4, batch, heads, length_q, head_dim, dtype=dtype)
    shape = batch, heads, -(-length_q // block_m), -(-length_k // block_n)
    keep = normal(seed + 3, *shape) < draw(st.sampled_from([-0.5, 0.5, 9.0]))
    modes = [draw(st.sampled_from([col.DENSE, col.SPARSE, col.WINDOWED])) for _ in range(heads)]
    policy = policy_rows(
        modes, draw(st.sampled_from([0, 1, 40])), draw(st.sampled_from([0, 7, 70]))
    )
    site = {"mask": draw(masks(length_q, length_k)), "scale": draw(st.sampled_from([0.15, -0.1]))}
    return (do, q, k, v, keep, policy), site | {"block_m": block_m, "block_n": block_n}


@settings(max_examples=40 if GPU else 12)
@given(problem=problems())
def test_agrees_with_the_oracle(problem, poisoned_empty):
    inputs, site = problem
    check(backward(*inputs, **site), oracle(*inputs, **site), inputs, site["scale"])


@pytest.mark.parametrize("mask", [Mask(), Mask(True, 20), Mask(True, 20, 60), Mask(True, -25)])
def test_agrees_with_dense_attention_in_double(mask, poisoned_empty):
    """Two query heads a kv head, three modes, lists that lack blocks, rows that see nothing."""
    do, q = normal(4, 2, 4, 75, 64), normal(0, 2, 4, 75, 64)
    k, v = (normal(seed, 2, 2, 110, 64) for seed in (1, 2))
    policy = policy_rows([col.DENSE, col.WINDOWED, col.SPARSE, col.WINDOWED])
    keep = normal(3, 2, 4, 3, 4) < 0.4
    keep[:, 0, 1] = False
    site = {"mask": mask, "scale": 0.2, "block_m": 32, "block_n": 32}
    inputs = do, q, k, v, keep, policy
    check(backward(*inputs, **site), dense(*inputs, **site), inputs, site["scale"])


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_sign_of_the_scale(scale):
    do, q, k, v = (normal(seed, 1, 1, 40, 32) for seed in range(4))
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    inputs = do, q, k, v, keep, policy_rows([col.DENSE])
    site = {"mask": Mask(True), "scale": scale, "block_m": 16, "block_n": 16}
    check(backward(*inputs, **site), dense(*inputs, **site), inputs, site["scale"])


def test_what_sees_nothing_or_is_seen_by_nobody_gets_zero(poisoned_empty):
    do, q, k, v = (normal(seed, 1, 1, 64, 32) for seed in range(4))
    keep = torch.ones(1, 1, 2, 4, dtype=torch.bool, device=DEVICE)
    keep[:, :, 1], keep[:, :, :, 1] = False, False
    site = {"mask": Mask(True, offset=-10), "scale": 0.2, "block_m": 32, "block_n": 16}
    dq, dk, dv = backward(do, q, k, v, keep, policy_rows([col.DENSE]), **site)
    blind = torch.tensor([i < 10 or i >= 32 for i in range(64)], device=DEVICE)
    unseen = torch.tensor([j > 21 or j >= 16 for j in range(64)], device=DEVICE)
    assert torch.equal(dq[0, 0].abs().sum(-1) == 0, blind)
    assert torch.equal(dv[0, 0].abs().sum(-1) == 0, unseen)
    assert torch.equal(dk[0, 0].abs().sum(-1) == 0, unseen)


@pytest.mark.parametrize(
    ("mask", "mode", "hidden", "length"),
    [
        (Mask(True, offset=-24), col.DENSE, slice(40, 96), 64),
        (Mask(True), col.DENSE, slice(50, 96), 50),  # a query past the end would see key 50
        (Mask(True, offset=90, window=40), col.DENSE, slice(0, 51), 64),
        (Mask(False, offset=90), col.WINDOWED, slice(7, 51), 64),
    ],
)
def test_nan_in_a_key_that_no_row_sees_has_no_effect(mask, mode, hidden, length):
    do, q, k, v = (normal(s, 1, 1, n, 32) for s, n in enumerate((length, length, 96, 96)))
    k[:, :, hidden] = v[:, :, hidden] = torch.nan
    keep = torch.ones(1, 1, 1, 3, dtype=torch.bool, device=DEVICE)
    inputs = do, q, k, v, keep, policy_rows([mode], window=40, sink=7)
    site = {"mask": mask, "scale": 0.2, "block_m": 64, "block_n": 32}
    clean = do, q, k.nan_to_num(), v.nan_to_num(), *inputs[4:]
    check(backward(*inputs, **site), dense(*clean, **site), inputs, site["scale"])


def test_nan_in_a_value_leaves_the_queries_before_it_alone():
    """The forward's output is that of clean values: within a tile it would be NaN too."""
    do, q, k, v = (normal(seed, 1, 1, 96, 32) for seed in range(4))
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    policy, lists_kept = policy_rows([col.DENSE]), lists.from_keep(keep)
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 32, "block_n": 32}
    want = dense(do, q, k, v, keep, policy, **site)[0][0, 0]
    saved = *triton_forward.forward(q, k, v, *lists_kept, policy, **site), *lists_kept, policy
    v[:, :, 40] = torch.nan
    dq = triton_backward.backward(do, q, k, v, *saved, **site)[0][0, 0]
    assert torch.equal(dq.isnan().any(-1), torch.arange(96, device=DEVICE) >= 40)
    assert relative(dq[:40], want[:40]) <= 1e-5


def test_strides_of_any_kind():
    """Last stride 2, an expanded kv head, a sliced length, one number as do."""
    q = normal(0, 1, 2, 40, 64)[..., ::2]
    k = normal(1, 1, 1, 40, 32).expand(1, 2, 40, 32)
    v = normal(2, 1, 2, 80, 32)[:, :, ::2]
    do = normal(3, 1).expand(1, 2, 40, 32)
    keep = normal(4, 1, 2, 3, 3) < 1
    inputs = do, q, k, v, keep, policy_rows([col.DENSE] * 2)
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 16, "block_n": 16}
    check(backward(*inputs, **site), dense(*inputs, **site), inputs, site["scale"])


def test_gradients_are_laid_out_as_models_read_them():
    do, q, k, v = (normal(seed, 2, 2, 20, 32, dtype=torch.float16) for seed in range(4))
    keep = torch.ones(2, 2, 2, 2, dtype=torch.bool, device=DEVICE)
    site = {"mask": Mask(), "scale": 0.2, "block_m": 16, "block_n": 16}
    for gradient in backward(do, q, k, v, keep, policy_rows([col.DENSE] * 2), **site):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("tile_n", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_to_read_tiles(boxed, tile_n, causal, monkeypatch):
    """Boxes or pointers; a part of a block, a block, or two side by side in a step."""
    if not GPU or not boxed:
        monkeypatch.setattr(boxes, "has_copy_engine", lambda device: boxed)
    monkeypatch.setattr(triton_backward, "dq_tiling", lambda *_: (32, tile_n, 4, 2))
    monkeypatch.setattr(triton_backward, "dkdv_tiling", lambda *_: (32, min(tile_n, 64), 4, 2))
    do, q = normal(0, 1, 2, 200, 32), normal(1, 1, 2, 200, 32)
    k, v = normal(2, 1, 1, 300, 32), normal(3, 1, 1, 300, 32)
    keep = normal(4, 1, 2, 4, 5) < 1
    inputs = do, q, k, v, keep, policy_rows([col.DENSE, col.SPARSE])
    site = {"mask": Mask(causal, 60 if causal else 0), "scale": 0.2} | BLOCKS_64
    check(backward(*inputs, **site), dense(*inputs, **site), inputs, site["scale"])


BLOCKS_64 = {"block_m": 64, "block_n": 64}


def test_views_that_the_copy_engine_cannot_read(monkeypatch):
    monkeypatch.setattr(boxes, "has_copy_engine", lambda device: True)
    x = normal(0, 2, 2, 40, 66, dtype=torch.bfloat16)
    assert boxes.readable(x[..., :64].contiguous())
    assert not boxes.readable(x[..., :64])  # rows of 132 bytes
    assert not boxes.readable(x[..., :64].contiguous()[..., ::2])
    assert not boxes.readable(x[:, :1, :, :64].contiguous().expand(2, 4, 40, 64))
    assert not boxes.readable(normal(0, 2, 2, 40, 80))  # needs padding
    assert not boxes.readable(normal(0, 129)[1:].view(1, 1, 2, 64))
    assert boxes.readable(normal(0, 2, 1, 40, 64).transpose(1, 2)[:, :1])


@pytest.mark.parametrize("shared_bytes", [65_536, 101_376, 166_912, 232_448])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("blocks", [(16, 16), (64, 64), (128, 64), (128, 128)])
def test_tiles_fit(shared_bytes, head_dim, itemsize, blocks):
    row_bytes = head_dim * itemsize
    tile_m, tile_n, _, stages = triton_backward.dq_tiling(
        head_dim, itemsize, *blocks, shared_bytes
    )
    assert blocks[0] % tile_m == 0
    assert blocks[1] % tile_n == 0 or tile_n == 2 * blocks[1]
    assert min(tile_m, tile_n) >= 16
    assert stages >= 1
    assert (2 * tile_m + 2 * stages * tile_n) * row_bytes <= shared_bytes
    tile_m, tile_n, _, stages = triton_backward.dkdv_tiling(
        head_dim, itemsize, *blocks, shared_bytes
    )
    assert blocks[0] % tile_m == blocks[1] % tile_n == 0
    assert min(tile_m, tile_n) >= 16
    assert stages >= 1
    assert (2 * tile_n + 2 * stages * tile_m) * row_bytes <= shared_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_half_precision_at_size(dtype, head_dim, kv_heads):
    """Gradients within 3e-3 by norm of fp32's on the same inputs."""
    do, q = (normal(seed, 1, 4, 2000, head_dim, dtype=dtype) for seed in (0, 1))
    k, v = (normal(seed, 1, kv_heads, 2000, head_dim, dtype=dtype) for seed in (2, 3))
    keep = normal(4, 1, 4, 16, 32) < 0
    inputs = do, q, k, v, keep, policy_rows([col.SPARSE] * 3 + [col.WINDOWED], 300, 64)
    site = {"mask": Mask(True), "scale": head_dim**-0.5, "block_m": 128, "block_n": 64}
    got, want = backward(*inputs, **site), oracle(*inputs, **site)
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert relative(mine, theirs) <= 3e-3, name
    again = backward(*inputs, **site)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.gpu
def test_captured_without_a_sync_and_not_compiled_again():
    policy = policy_rows([col.DENSE] * 2)

    def gradients(length):
        do, q, k, v = (normal(s, 1, 2, length, 64, dtype=torch.bfloat16) for s in range(4))
        counts, indices = lists.from_keep(
            torch.ones(1, 2, *[-(-length // 64)] * 2, dtype=torch.bool, device=DEVICE)
        )
        site = {"mask": Mask(True, window=length), "scale": 0.1} | BLOCKS_64
        o, lse = triton_forward.forward(q, k, v, counts, indices, policy, **site)
        saved = o, lse, counts, indices, policy
        return lambda: triton_backward.backward(do, q, k, v, *saved, **site)

    kernels = [triton_backward.dq_kernel, triton_backward.dkdv_kernel]
    gradients(256)()
    before = [compiled(kernel) for kernel in kernels]
    for length in (2, 17, 100, 1000):
        gradients(length)()
    assert [compiled(kernel) for kernel in kernels] == before
    call, graph = gradients(256), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, call(), strict=True))


def compiled(kernel):
    """Number of variants of a Triton kernel compiled so far on the current device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])
