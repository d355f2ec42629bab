"""Gradients under masks that come with a call: those of attention written out, in double."""

import itertools
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
from afbs_compile.kernels.blind import BLIND, EVEN, MEAN, NAN, ZERO
from afbs_compile.kernels.data_mask import blocked, gathered

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWEST = torch.finfo(torch.float32).min
M, N = LENGTHS = 75, 135  # no multiples of a block; two query blocks, three key blocks
RUNS = {"pairs": (pairs, pairs), "triton": (triton_forward, triton_backward)}
SOME = settings(max_examples=60 if DEVICE == "cuda" else 6, phases=[Phase.generate])


@pytest.fixture(params=["own", "triton"], autouse=True)
def kernels(monkeypatch, request):
    """The device's own kernels, uncompiled; on a CPU also Triton's, in the interpreter."""
    monkeypatch.setattr(dispatch, "fused_scores", lambda *_: None)
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_at_density_one(name, causal, policy_tensor):
    """Two query heads a key head, more keys than queries, rows that see nothing."""
    given, parts = tensors(), MASKS[name]()
    policy, scale = policy_tensor(2, tau=1.0).to(DEVICE), 0.2
    site = policy, causal, 30 if causal else 0, 0, scale, "sub8", 0, "none"
    do = normal(5, 2, 2, M, 32)
    out = torch.ops.afbs.attention(*given, *site, *parts)
    want = expected(*given, parts, causal, 30, scale)
    got = torch.autograd.grad(out, given, do)
    wanted = torch.autograd.grad(want, given, do.double())
    assert len(parts) < 5 or parts[4] != NAN or want.isnan().any()
    for ours, theirs in zip((out, *got), (want, *wanted), strict=True):
        close(ours, theirs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5, equal_nan=True)
