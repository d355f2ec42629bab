"""Float masks that are boolean ones in disguise are given as such, blind rows included."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.kernels.blind import EVEN, MEAN, NAN, ZERO
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

B, H, L, D = 3, 2, 40, 32
LOWEST = torch.finfo(torch.float32).min
KEYS, ELEMENTS = "key padding", "elements"
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def there(data):
    return (data > 0)[:, None, None]


def causal(data):
    return torch.ones(L, L, dtype=torch.bool).tril() & there(data)


def hugging_face(data):
    """Eager attention of transformers."""
    zero = torch.tensor(0.0, dtype=torch.float32)
    return torch.where(causal(data), zero, LOWEST)


def turned(data):
    return torch.where(~causal(data), -math.inf, 0.0)


def method(data):
    return torch.zeros(B, 1, L, L).where(causal(data), LOWEST)


def zeros_filled(data):
    return torch.zeros(L, L).masked_fill(~causal(data), -math.inf)


def bert(data):
    """Of old: 1 for a token."""
    return (1.0 - there(data).float()) * LOWEST


def negated(data):
    return -((~there(data)).to(torch.float32) / 1e-35)


def repeated(data):
    """As diffusers prepares a mask for its heads."""
    mask = torch.where(data > 0, 0.0, LOWEST)[:, None]
    return mask.repeat_interleave(H, dim=0).view(B, H, -1, L)


def sliced(data):
    wide = F.pad(there(data), (0, 8))
    return torch.where(wide, 0.0, LOWEST).expand(B, 1, L, L + 8)[:, :, :, :L].contiguous()


def two(data):
    padding = torch.where(there(data), 0.0, -math.inf)
    return torch.zeros(L, L).masked_fill(~torch.ones(L, L).bool().tril(), -math.inf) + padding


def on_zeros(data):
    """T5's cross attention: a position bias that is none."""
    return torch.zeros(1, H, L, L) + torch.where(there(data), 0.0, LOWEST)


def cast(data):
    return torch.where(there(data), 0.0, torch.finfo(torch.float32).min).to(torch.bfloat16).float()


CAUSAL, FULL = Mask(True), Mask()
DISGUISED = [
    (hugging_face, CAUSAL, KEYS, EVEN),
    (turned, CAUSAL, KEYS, None),
    (method, CAUSAL, KEYS, EVEN),
    (zeros_filled, CAUSAL, KEYS, None),
    (bert, FULL, KEYS, EVEN),
    (negated, FULL, KEYS, EVEN),
    (repeated, FULL, ELEMENTS, EVEN),
    (sliced, FULL, ELEMENTS, EVEN),
    (two, CAUSAL, KEYS, None),
    (on_zeros, FULL, KEYS, EVEN),
    (cast, FULL, KEYS, None),
]


def sdpa(make):
    def function(q, k, v, data):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(data))

    return function


def chain(make):
    def function(q, k, v, data):
        return (q @ k.transpose(-1, -2) * D**-0.5 + make(data)).softmax(-1) @ v

    return function


def paddings():
    """The second and the third have rows that see nothing."""
    at, starts = torch.arange(L)[None], torch.tensor([[0], [9], [31]])
    yield (at < L - starts).long()
    yield (at >= starts).long()
    yield (at < torch.tensor([[0], [L], [3]])).long()


def planned(function, *args, dynamic=None):
    found = []

    def planner(gm, inputs):
        found.append((plan(gm, inputs, 16), gm, gm.code))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=planner, fullgraph=True, dynamic=dynamic)(*args)
    return found[-1]


def tensors():
    return tuple(torch.randn(B, H, L, D) for _ in range(3))


def run(found, gm, policy, args, min_length=1000):
    """The rewritten graph; by default the op runs dense, under the mask that it was given."""
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=min_length)
    named = dict(zip(("l_q_", "l_k_", "l_v_", "l_data_"), args, strict=True))
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        (out,) = new(*(named[n] for n in names), policy)
    return out


@pytest.mark.parametrize(("make", "mask", "kind", "blind"), DISGUISED)
@pytest.mark.parametrize("written", [sdpa, chain])
def test_what_is_under_the_disguise(make, mask, kind, blind, written, policy_tensor):
    args, function = tensors(), written(make)
    found, gm, before = planned(function, *args, next(paddings()))
    assert not found.refused
    (site,) = found.sites
    assert (site.mask, site.data.kind) == (mask, kind)
    assert site.blind == (blind or (ZERO if written is sdpa else NAN))
    assert gm.code == before
    for data in paddings():
        out = run(found, gm, policy_tensor(H)[None], (*args, data))
        want = function(*args, data)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_the_kernel_gives_blind_rows_their_due(policy_tensor):
    args, function = tensors(), chain(hugging_face)
    found, gm, _ = planned(function, *args, next(paddings()))
    for data in paddings():
        out = run(found, gm, policy_tensor(H, tau=1.0)[None], (*args, data), min_length=1)
        torch.testing.assert_close(out, function(*args, data), atol=1e-5, rtol=1e-5)


def replaced_scores(fill):
    def function(q, k, v, data):
        return (q @ k.transpose(-1, -2)).masked_fill(~causal(data), fill).softmax(-1) @ v

    return function


@pytest.mark.parametrize(("fill", "blind"), [(-math.inf, NAN), (-1e9, MEAN), (LOWEST, MEAN)])
def test_scores_that_are_replaced(fill, blind, policy_tensor):
    args, function = tensors(), replaced_scores(fill)
    found, gm, _ = planned(function, *args, next(paddings()))
    (site,) = found.sites
    assert (site.blind, site.data.kind) == (blind, KEYS)
    for data in paddings():
        out = run(found, gm, policy_tensor(H)[None], (*args, data))
        want = function(*args, data)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def mild(data):
    """In a blind row the scores count."""
    return torch.where(there(data), 0.0, -1e4)


def not_a_flag(data):
    """Nobody says that these numbers are 0 and 1."""
    return (1.0 - data[:, None, None].float()) * LOWEST


def two_numbers(data):
    """Where both hide the sum is −inf."""
    return torch.where(there(data), 0.0, LOWEST) + hugging_face(data)


def written_to(data):
    mask = torch.where(there(data), 0.0, LOWEST)
    seen = mask.expand(B, 1, L, L)
    mask[:, :, :, :3] = 1.0
    return seen


def positive(data):
    return torch.where(there(data), 0.0, 1e30)


def not_zeros(data):
    return torch.ones(L, L).masked_fill(~causal(data), -math.inf)


@pytest.mark.parametrize("make", [mild, not_a_flag, two_numbers, written_to, positive, not_zeros])
def test_what_is_no_boolean_mask(make):
    found, gm, before = planned(sdpa(make), *tensors(), next(paddings()))
    assert not any(site.data.elements or site.data.keys for site in found.sites)
    assert gm.code == before


def test_two_kinds_of_fill_next_to_an_added_mask_cannot_be_told_apart():
    def function(q, k, v, data):
        scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(data), -1e9)
        return (scores + torch.where(there(data), 0.0, LOWEST)).softmax(-1) @ v

    found, _, _ = planned(function, *tensors(), next(paddings()))
    assert not found.sites
    assert "that see nothing" in next(iter(found.refused.values()))


def test_a_refused_call_gets_its_float_mask_back():
    function = sdpa(hugging_face)
    found = []

    def planner(gm, inputs):
        found.append((plan(gm, inputs, 16, "tangent"), gm))
        return gm.forward

    torch.compile(function, backend=planner)(*tensors(), next(paddings()))
    made, _ = found[-1]
    assert "with compensation" in next(iter(made.refused.values()))
    (call,) = [n for n in made.gm.graph.nodes if "scaled_dot" in str(n.target)]
    assert call.kwargs["attn_mask"].meta["example_value"].is_floating_point()
    assert len(call.args) + len(call.kwargs) == 4


@pytest.mark.parametrize("weights", [False, True])
def test_modules_of_torch(weights, policy_tensor):
    """`F._canonical_mask` makes a float mask of the padding."""
    inner = nn.MultiheadAttention(64, 2, batch_first=True).eval()

    def function(q, data):
        return inner(q, q, q, key_padding_mask=data == 0, need_weights=weights)[0]

    x = torch.randn(B, L, 64)
    found, gm, _ = planned(function, x, next(paddings()))
    (site,) = found.sites
    assert site.data
    assert site.blind == (NAN if weights else ZERO)
    new = rewrite(found.gm, found.sites, policy_tensor(2)[None], selector="sub8", min_length=1000)
    for data in paddings():
        values = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
        inputs = [x if "q" in n else data if "data" in n else dict(inner.named_parameters())[at(n)]
                  for n in values]  # fmt: skip
        with torch.no_grad():
            (out,) = new(*inputs, policy_tensor(2)[None])
            (want,) = gm(*inputs)  # run as it is, the module takes a fast path that gives NaN
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def at(name):
    """The parameter's name in a placeholder's."""
    part = "in_proj" if "in_proj" in name else "out_proj."
    return part + ("_" if part == "in_proj" else "") + ("weight" if "weight" in name else "bias")


def test_symbolic_lengths(policy_tensor):
    def function(q, k, v, data):
        n = data.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril() & there(data)
        return F.scaled_dot_product_attention(q, k, v, torch.where(seen, 0.0, LOWEST))

    args = (*tensors(), next(paddings()))
    for x in args:
        torch._dynamo.mark_dynamic(x, 2 if x.dim() == 4 else 1)
    found, _, _ = planned(function, *args)
    (site,) = found.sites
    assert (site.data.kind, site.blind) == (KEYS, EVEN)
    assert all(rule.holds([77] * len(rule.sizes)) for rule in found.rules)
