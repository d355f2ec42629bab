"""Attention spelt as matmul, softmax, matmul is SDPA, or is left as it was for a reason."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.capture import Stream
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.additive import NEVER, boolean
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

B, H, L, D = 2, 4, 48, 32
NEG = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tensors():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, H, L, D, generator=generator) for _ in range(3))


def lower_triangle():
    return torch.ones(L, L, dtype=torch.bool).tril()


def scores(q, k):
    return q @ k.transpose(-1, -2)


def scale_before(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q / D**0.5, k.mT), dim=-1), v)


def scale_after(q, k, v):
    return (scores(q, k) / D**0.5).softmax(-1) @ v


def scaled_keys(q, k, v):
    return torch.matmul(q, (k * D**-0.5).permute(0, 1, 3, 2)).softmax(3).matmul(v)


def gpt2(q, k, v):
    s = scores(q, k) / torch.full([], D**0.5)
    s = torch.where(lower_triangle(), s, torch.full([], NEG))
    return F.dropout(F.softmax(s, dim=-1), 0.1, training=False) @ v


def bert(q, k, v):
    mask = torch.where(lower_triangle(), 0.0, NEG)[None, None]
    return nn_dropout(F.softmax(scores(q, k) * D**-0.5 + mask, dim=-1)) @ v


nn_dropout = torch.nn.Dropout(0.1).eval()


def t5(q, k, v):
    s = scores(q, k)
    s += torch.zeros(1, H, L, L)
    return F.softmax(s.float(), dim=-1).type_as(s) @ v


def upcast(q, k, v):
    mask = torch.full((L, L), float("-inf")).triu(1)
    p = F.softmax(scores(q, k) * D**-0.5 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(p, v).transpose(1, 2).reshape(B, L, H * D)


def masked_fill(q, k, v):
    s = torch.einsum("b h i d, b h j d -> b h i j", q * D**-0.5, k)
    s = s.masked_fill(~lower_triangle(), -1e9)
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v).flatten(2)


def einsum_ellipsis(q, k, v):
    s = torch.einsum("...id,...jd->...ij", q, k) * 0.3
    return torch.einsum("...ij,...jd->...id", s.softmax(-1), v)


def einsum_rows_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def hidden_first(q, k, v):
    return torch.where(~lower_triangle(), NEG, scores(q, k)).softmax(-1) @ v


def two_masks(q, k, v):
    s = torch.where(lower_triangle(), scores(q, k) * 0.2, NEG)
    return (s + torch.zeros(L, L)).softmax(-1) @ v


def mask_before_scale(q, k, v):
    mask = torch.full((L, L), -1e9).triu(1)
    return ((scores(q, k) + mask) * 0.2).softmax(-1) @ v


def flat(q, k, v):
    q, k, v = (x.reshape(B * H, L, D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v).view(B, H, L, D)


def bart(q, k, v):
    q, k, v = (x.reshape(B * H, L, D) for x in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)).view(B, H, L, L) + torch.full((L, L), NEG).triu(1)
    return torch.bmm(s.view(B * H, L, L).softmax(-1), v).view(B, H, L, D)


def diffusers(q, k, v):
    q, k, v = (x.reshape(B * H, L, D) for x in (q, k, v))
    empty = torch.empty(B * H, L, L)
    s = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
    return torch.bmm(s.softmax(dim=-1).to(q.dtype), v)


def biased_product(q, k, v):
    q, k, v = (x.reshape(B * H, L, D) for x in (q, k, v))
    mask = torch.full((1, L, L), NEG).triu(1)
    return torch.bmm(torch.baddbmm(mask, q, k.transpose(-1, -2)).softmax(-1), v)


def one_key_head(q, k, v):
    return scores(q, k[:, :1]).softmax(-1) @ v[:, :1]


def a_temperature_a_head(q, k, v):
    return (scores(q, k) * torch.rand(H, 1, 1)).softmax(-1) @ v


CAUSAL, FULL = Mask(True), Mask()
CHAINS = {
    scale_before: FULL, scale_after: FULL, scaled_keys: FULL, gpt2: CAUSAL, bert: CAUSAL,
    t5: FULL, upcast: CAUSAL, masked_fill: CAUSAL, einsum_ellipsis: FULL,
    einsum_rows_first: FULL, hidden_first: CAUSAL, two_masks: CAUSAL, mask_before_scale: CAUSAL,
    flat: FULL, bart: CAUSAL, diffusers: FULL, biased_product: CAUSAL, one_key_head: FULL,
    a_temperature_a_head: FULL,
}  # fmt: skip


def planned(function, *args):
    """The plan, the graph that came, its code before, and its inputs."""
    seen = []

    def planner(gm, example_inputs):
        before = gm.code
        seen.append((plan(gm, example_inputs, 16), gm, before, example_inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=planner, fullgraph=True)(*args)
    return seen[-1]


@pytest.mark.parametrize("function", CHAINS, ids=lambda f: f.__name__)
def test_chains_are_rewritten_and_equal(function, policy_tensor):
    found, gm, before, inputs = planned(function, *tensors())
    assert not found.refused
    (site,) = found.sites
    assert site.mask == CHAINS[function]
    assert site.heads == H or function in (diffusers, biased_product, flat)
    policy = policy_tensor(site.heads, tau=1.0)[None]
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=L + 1)  # dense inside
    with torch.no_grad():
        torch.manual_seed(1)
        want = gm(*inputs)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(new(*inputs, policy)[0], want, atol=1e-5, rtol=1e-5)
    assert gm.code == before
    names = {str(getattr(n.target, "__name__", n.target)) for n in new.graph.nodes}
    assert not names & {"softmax", "bmm", "baddbmm", "einsum", "matmul", "dropout"}


def test_symbolic_lengths_add_no_guards():
    args = tensors()
    for x in args:
        torch._dynamo.mark_dynamic(x, 2)
    with_mask = planned(growing, *args)[0]
    for found in (planned(scale_after, *args)[0], with_mask):
        (site,) = found.sites
        assert site.heads == H
    (rule,) = with_mask.rules
    assert rule.holds([100] * len(rule.sizes))


def growing(q, k, v):
    n = q.shape[2]
    mask = torch.full((n, n), NEG).triu(1)
    return (scores(q, k) + mask).softmax(-1) @ v


def returned_weights(q, k, v):
    p = scores(q, k).softmax(-1)
    return p @ v, p


def returned_scores(q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def softcap(q, k, v):
    return torch.tanh(scores(q, k)).softmax(-1) @ v


def alibi(q, k, v):
    distance = torch.arange(L)[None] - torch.arange(L)[:, None]
    return (scores(q, k) + distance * 0.1).softmax(-1) @ v


def learned_bias(q, k, v):
    return (scores(q, k) + q[:, :, :, :1] * torch.ones(L)).softmax(-1) @ v


def mild_fill(q, k, v):
    return torch.where(lower_triangle(), scores(q, k), -5.0).softmax(-1) @ v


def blind_rows(q, k, v):
    return scores(q, k).masked_fill(~lower_triangle().tril(-1), NEG).softmax(-1) @ v


def dropped(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.1, training=True) @ v


def reweighted(q, k, v):
    return (scores(q, k) * torch.rand(L, L)).softmax(-1) @ v


def mixed_dtypes(q, k, v):
    return scores(q, k).softmax(-1).double() @ v.double()


REFUSED = {
    returned_weights: "attention weights have other users (output_attentions?)",
    returned_scores: "attention scores have other users",
    softcap: "scores pass through tanh",
    mild_fill: "hidden scores become -5.0, which is not negative enough to hide them",
    blind_rows: "the mask has rows that see nothing",
    dropped: "dropout",
    reweighted: "scores are multiplied by a tensor",
    mixed_dtypes: "q, k and v differ in dtype",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused_chains_are_left_as_they_were(function):
    found, gm, before, _ = planned(function, *tensors())
    assert not found.sites
    (reason,) = found.refused.values()
    assert reason.startswith(REFUSED[function])
    assert gm.code == before
    assert [n.target for n in found.gm.graph.nodes] == [n.target for n in gm.graph.nodes]


@pytest.mark.parametrize("function", [alibi, learned_bias])
def test_biases_are_added(function, policy_tensor):
    found, _, _, inputs = planned(function, *tensors())
    assert [(s.mask, s.data.kind) for s in found.sites] == [(Mask(), "bias")]
    policy = policy_tensor(H, tau=1.0)[None]
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=1)
    with torch.no_grad():
        out = new(*inputs, policy)[0]
    torch.testing.assert_close(out, function(*tensors()), atol=1e-5, rtol=1e-5)


def test_a_bias_that_needs_gradients_is_left_dense():
    """T5's is a weight."""
    weight = torch.zeros(1, H, L, L, requires_grad=True)
    found = []

    def planner(gm, inputs):
        found.append(plan(gm, inputs, 16))
        return gm.forward

    def function(q, k, v, bias):
        return (scores(q, k) + bias).softmax(-1) @ v

    torch.compile(function, backend=planner)(*tensors(), weight)
    assert not found[-1].sites
    assert "no gradient of a mask that is added" in next(iter(found[-1].refused.values()))


def test_softmax_without_attention_is_nobodys_business():
    def router(q, k, v):
        return (q @ k[0, 0, :8].T).softmax(-1).topk(2)[0] + F.softmax(v, -1)[..., :2]

    found = planned(router, *tensors())[0]
    assert not found.sites
    assert not found.refused


def test_one_refused_chain_does_not_hold_up_another():
    def both(q, k, v):
        return scale_after(mild_fill(q, k, v), k, v)

    found = planned(both, *tensors())[0]
    assert len(found.sites) == len(found.refused) == 1


@given(st.lists(st.sampled_from([0.0, NEVER, -1e9, float("-inf")]), min_size=4, max_size=4))
def test_a_float_mask_is_boolean_only_if_softmax_agrees(values):
    mask = torch.tensor(values)[None]
    found = boolean(mask, every_row=False)
    if isinstance(found, str):
        assert max(values) < 0
    else:
        s = torch.randn(1, 4)
        want = s.masked_fill(~found, float("-inf")).softmax(-1)
        torch.testing.assert_close((s + mask).softmax(-1), want, atol=0, rtol=1e-6)


@pytest.mark.parametrize("value", [1.0, -1.0, NEVER / 2, float("nan")])
def test_other_float_masks_are_not(value):
    assert isinstance(boolean(torch.tensor([[0.0, value]]), every_row=False), str)


def test_calibration_sees_queries_keys_and_values():
    found, _, _, inputs = planned(masked_fill, *tensors())
    (site,) = found.sites
    layer = Stream(found.gm, inputs, found.sites).layer(site.name)
    q, k, v = tensors()
    torch.testing.assert_close((layer.q, layer.k, layer.v), (q * D**-0.5, k, v))
    assert (layer.mask, layer.scale) == (CAUSAL, 1.0)
