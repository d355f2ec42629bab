"""Gradients under masks that come with a call: those of attention written out, in double."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import afbs_compile.kernels.op  # noqa: F401  registers the ops
from afbs_compile.kernels import (
    dispatch,
    pairs,
    reference,
    selection,
    triton_backward,
    triton_forward,
)
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.blind import EVEN, MEAN, NAN, ZERO
from afbs_compile.kernels.data_mask import blocked, gathered
from afbs_compile.kernels.mask_arguments import mask_of

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWEST = torch.finfo(torch.float32).min
M, N = LENGTHS = 75, 135  # no multiples of a block; two query blocks, three key blocks
KINDS = ("right", "left", "holes", "segments", "packed", "elements", "shared elements")
SOME = settings(max_examples=60 if DEVICE == "cuda" else 6, phases=[Phase.generate])


@pytest.fixture(params=["own", "triton"], autouse=True)
def kernels(monkeypatch, request):
    """The device's own kernels; on a CPU also Triton's, in the interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("Triton's are the device's own")
        monkeypatch.setattr(dispatch, "by_pairs", lambda device_type: False)
    return request.param


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def keys(*ends):
    return torch.arange(N, device=DEVICE) < torch.tensor(ends, device=DEVICE)[:, None]


def segments(at, length):
    return (torch.arange(length, device=DEVICE) >= torch.tensor(at, device=DEVICE)[:, None]).long()


def elements(share, *heads):
    seen = normal(9, *heads, *LENGTHS) < share
    seen[..., 60:70, :] = False  # rows that see nothing
    seen[..., 70:, 64:128] = True  # a block that is wholly visible to its rows
    return seen


def disguised(low):
    """Padding as models add it: a row of one entry that sees nothing at all, too."""
    return torch.where(keys(N, 0)[:, None, None], 0.0, low)


def relative():
    bias = normal(8, 1, 2, *LENGTHS)
    bias[:, :, :, 110:] = LOWEST
    bias[:, 1, 60:65] = LOWEST  # rows in which all that is seen is as low
    bias[:, 1, 66:70] = -math.inf
    return bias


MASKS = {  # keys, segments of queries and keys, elements, blind, bias
    "ragged": lambda: (keys(N, 77)[:, None, None],),
    "an entry that sees nothing": lambda: (keys(N, 0),),
    "packed": lambda: (keys(120, N), segments([40, 70], M), segments([40, 70], N)),
    "elements": lambda: (None, None, None, elements(0.0, 2, 2)),
    "shared elements": lambda: (None, None, None, elements(0.5)),
    "float mask in disguise": lambda: (keys(N, 0), None, None, None, EVEN),
    "replaced scores": lambda: (keys(N, 0), None, None, None, MEAN),
    "minus infinity": lambda: (None, None, None, elements(0.0, 1, 2), NAN),
    "bias": lambda: (None, None, None, None, ZERO, relative()),
    "padding that is added": lambda: (None, None, None, None, ZERO, disguised(LOWEST)),
    "bias and more": lambda: (keys(N, 90), None, None, elements(0.5), ZERO, normal(7, M, N)),
}


def tensors(heads=2, kv_heads=1):
    shapes = (heads, M), (kv_heads, N), (kv_heads, N)
    return [normal(n, 2, *shape, 32).requires_grad_() for n, shape in enumerate(shapes)]


def expected(q, k, v, parts, causal, offset, scale):
    """Attention as a model writes it, in double; what a blind row is comes from how."""
    mask_keys, q_segments, k_segments, shown, blind, bias = [*parts, *[None] * 6][:6]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    i, j = torch.arange(M, device=DEVICE)[:, None], torch.arange(N, device=DEVICE)
    seen = torch.ones(2, 1, *LENGTHS, dtype=torch.bool, device=DEVICE)
    seen = seen & (j <= i + offset) if causal else seen
    if mask_keys is not None:
        seen = seen & mask_keys.reshape(2, 1, 1, -1)
    if q_segments is not None:
        seen = seen & (q_segments[:, None, :, None] == k_segments[:, None, None])
    seen = seen if shown is None else seen & shown
    s = scale * q @ k.transpose(2, 3)
    if bias is not None:  # in float32, where a score beside the lowest number is lost
        seen = seen & (bias > -math.inf)
        low = bias.float() < -1e30
        s = torch.where(low, s - s.detach(), s) + bias.masked_fill(bias == -math.inf, 0).double()
    if blind == MEAN:
        return s.masked_fill(~seen, LOWEST).softmax(-1) @ v
    if blind == EVEN:  # the sum is the lowest number, whatever the score was
        return torch.where(seen, s, s - s.detach() + LOWEST).softmax(-1) @ v
    p = (s + torch.where(seen, 0, -math.inf)).softmax(-1)  # NaN, and so are the gradients
    if blind == NAN:
        return p @ v
    blind_rows = ~seen.any(3, keepdim=True)
    return s.masked_fill(~seen & ~blind_rows, -math.inf).softmax(-1).masked_fill(blind_rows, 0) @ v


@pytest.mark.parametrize(
    ("name", "causal"),
    [*((name, False) for name in MASKS), ("ragged", True), ("packed", True), ("bias", True)],
)
def test_gradients_at_density_one(name, causal, policy_tensor):
    """Two query heads a key head, more keys than queries, rows that see nothing."""
    leaves, parts = tensors(), MASKS[name]()
    policy, scale = policy_tensor(2, tau=1.0).to(DEVICE), 0.2
    site = policy, causal, 30 if causal else 0, 0, scale, "sub8", 0, "none"
    do = normal(5, 2, 2, M, 32)
    out = torch.ops.afbs.attention(*leaves, *site, *parts)
    want = expected(*leaves, parts, causal, 30, scale)
    got = torch.autograd.grad(out, leaves, do)
    wanted = torch.autograd.grad(want, leaves, do.double())
    assert len(parts) < 5 or parts[4] != NAN or want.isnan().any()
    for ours, theirs in zip((out, *got), (want, *wanted), strict=True):
        close(ours, theirs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5, equal_nan=True)


def both_passes(kernels, do, q, k, v, lists, policy, data, site):
    """Gradients by the kernels alone, for blocks that are given."""
    own = kernels == "own" and DEVICE == "cpu"
    forward, backward = (pairs, pairs) if own else (triton_forward, triton_backward)
    o, lse = forward.forward(q, k, v, *lists, policy, data=data, **site)
    return backward.backward(do, q, k, v, o, lse, *lists, policy, data=data, **site)


@SOME
@given(st.data(), st.sampled_from([0.5, 1.0]), st.booleans())
def test_gradients_of_the_blocks_that_are_kept(
    kernels, problems, data_masks, biases, data, tau, biased
):
    """All sizes of blocks, GQA, windows, offsets, lists that lack blocks."""
    problem = data.draw(problems(longest=100, tau=tau))
    drawn = [None] * 4 if biased else data.draw(data_masks(problem, KINDS))
    parts = [*drawn, data.draw(biases(problem)) if biased else None]
    parts = [None if x is None else x.to(DEVICE) for x in parts]
    q, k, v, policy = (x.to(DEVICE) for x in (problem.q, problem.k, problem.v, problem.policy))
    policy[-1, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED]))
    lengths = q.shape[2], k.shape[2]
    mask = gathered(parts, lengths)
    masked = blocked(mask, problem.mask, *lengths, **problem.blocks)
    lists = selection.select(q, k, policy, selector="sub8", masked=masked, **problem.site)
    do = normal(1, *q.shape)
    got = both_passes(kernels, do, q, k, v, lists, policy, mask, problem.site)
    want = reference.backward(do, q, k, v, *lists, policy, data=mask, **problem.site)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_nan_in_keys_that_are_hidden_has_no_effect(biased, policy_tensor):
    q, k, v = tensors()
    seen = keys(N, 77)
    parts = (seen,)
    if biased:
        parts = (None, None, None, None, ZERO, torch.where(seen[:, None, None], 0.3, -math.inf))
    site = policy_tensor(2, tau=1.0).to(DEVICE), False, 0, 0, 0.2, "sub8", 0, "none", *parts
    want = torch.autograd.grad(torch.ops.afbs.attention(q, k, v, *site).sum(), (q, k, v))
    hidden = ~seen[:, None, :, None].expand(k.shape)
    k, v = (x.detach().masked_fill(hidden, math.nan).requires_grad_() for x in (k, v))
    got = torch.autograd.grad(torch.ops.afbs.attention(q, k, v, *site).sum(), (q, k, v))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    assert not got[1][hidden].any()
    assert not got[2][hidden].any()


@pytest.mark.parametrize("blind", [MEAN, EVEN, NAN])
def test_nan_stays_in_the_entry_with_the_blind_row(blind, policy_tensor):
    """An entry without one must not meet the NaN of its hidden keys."""
    q, k, v = tensors()
    parts = keys(77, 0), None, None, None, blind
    site = policy_tensor(2, tau=1.0).to(DEVICE), False, 0, 0, 0.2, "sub8", 0, "none", *parts
    with torch.no_grad():
        k[0, :, 77:] = v[0, :, 77:] = math.nan
    found = torch.autograd.grad(torch.ops.afbs.attention(q, k, v, *site).sum(), (q, k, v))
    assert all(x[0].isfinite().all() for x in found)
    assert all(x[1].isnan().all() == (blind == NAN) for x in found)


@pytest.mark.parametrize("kernels", ["own"], indirect=True)
@pytest.mark.parametrize("name", ["packed", "float mask in disguise", "bias"])
def test_ops_are_well_formed(name, policy_tensor):
    parts, (q, k, v) = MASKS[name](), tensors()
    site = policy_tensor(2).to(DEVICE), True, 0, 0, 0.2, "sub8"
    torch.library.opcheck(torch.ops.afbs.attention_train.default, (q, k, v, *site, *parts))
    torch.library.opcheck(torch.ops.afbs.attention.default, (q, k, v, *site, 0, "none", *parts))
    q, k, v = (x.detach() for x in (q, k, v))
    saved = torch.ops.afbs.attention_train(q, k, v, *site, *parts)
    args = torch.ones_like(q), q, k, v, *saved, *site[:-1], *parts
    torch.library.opcheck(torch.ops.afbs.attention_backward.default, args)


@pytest.mark.parametrize("kernels", ["own"], indirect=True)
@pytest.mark.parametrize("name", ["packed", "shared elements", "bias"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(name, dynamic, policy_tensor, fresh_dynamo):
    parts, leaves = MASKS[name](), tensors()
    site = policy_tensor(2, tau=0.5).to(DEVICE), True, 30, 0, 0.2, "sub8", 0, "none"

    def loss(q, k, v, *parts):
        return torch.ops.afbs.attention(q, k, v, *site, *parts).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    got, want = (torch.autograd.grad(f(*leaves, *parts), leaves) for f in (compiled, loss))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ragged", "bias and more"])
@pytest.mark.parametrize("kernels", ["own"], indirect=True)
def test_half_precision_and_autocast(name, policy_tensor):
    parts, leaves = MASKS[name](), tensors()
    site = policy_tensor(2, tau=1.0).to(DEVICE), False, 0, 0, 0.2, "sub8", 0, "none", *parts
    do = normal(5, 2, 2, M, 32)
    want = torch.autograd.grad(torch.ops.afbs.attention(*leaves, *site), leaves, do)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = torch.ops.afbs.attention(*leaves, *site)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, do.bfloat16()), want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=4e-2)


def test_a_mask_that_is_to_be_trained_is_refused(policy_tensor):
    q, k, v = tensors()
    bias = relative().requires_grad_()
    site = policy_tensor(2).to(DEVICE), False, 0, 0, 0.2, "sub8", 0, "none"
    with pytest.raises(RuntimeError, match="no gradient of a mask that is added"):
        torch.ops.afbs.attention(q, k, v, *site, None, None, None, None, ZERO, bias)


def test_sparse_gradients_differ_from_dense_ones(policy_tensor):
    """What is compared above is not all the same."""
    leaves, parts = tensors(), MASKS["ragged"]()
    found = []
    for tau in (0.0, 1.0):
        site = policy_tensor(2, tau=tau).to(DEVICE), False, 0, 0, 0.2, "sub8", 0, "none"
        out = torch.ops.afbs.attention(*leaves, *site, *parts)
        found.append(torch.autograd.grad(out.sum(), leaves))
    assert not torch.allclose(found[0][2], found[1][2])
    assert mask_of(parts, LENGTHS).kind == "key padding"
