"""Masks that depend on data are taken apart where broadcasting proves it, else as they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

B, L = 3, 40
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Planner:
    """A backend that plans and runs eagerly."""

    def __init__(self, compensation="none"):
        self.graph, self.plan, self.compensation = None, None, compensation

    def __call__(self, gm, example_inputs):
        self.graph = gm
        self.plan = plan(gm, example_inputs, 16, self.compensation)
        return gm.forward


def index(length=L):
    return torch.arange(length)[None, None, :, None], torch.arange(length)[None, None, None]


def gathered_keys(data, length):
    """As Hugging Face writes it."""
    _, j = index(length)
    batch = torch.arange(data.shape[0])[:, None, None, None]
    return data.to(dtype=torch.bool)[batch, j]


def causal_padding(data, length):
    i, j = index(length)
    result = i.new_ones((), dtype=torch.bool) & (j <= i).to(data.device)
    return (result & gathered_keys(data, length)).expand(data.shape[0], -1, length, length)


def window_padding(data, length):
    i, j = index(length)
    return (j > i - 7) & (j <= i) & gathered_keys(data, length)


def full_padding(data, length):
    i, _ = index(length)
    return ((i >= 0) & gathered_keys(data, length)).expand(-1, -1, length, length)


def packed(data, length):
    """As Hugging Face writes it; `data` are position ids."""
    i, j = index(length)
    batch = torch.arange(data.shape[0])[:, None, None, None]
    steps = torch.diff(data, prepend=data[:, :1] - 1, dim=-1)
    ids = (steps != 1).cumsum(-1)
    positions = data.expand(data.shape[0], -1)
    same = ids[batch, i] == ids[batch, j]
    return same & (positions[batch, j] <= positions[batch, i])


def documents(data, length):
    i, j = index(length)
    return (data[:, None, :, None] == data[:, None, None]) & (j <= i)


def padded_documents(data, length):
    return documents(data, length) & (data > 0)[:, None, None]


def prefix(data, length):
    """The first keys are seen by all: an `or`."""
    i, j = index(length)
    return (j <= i) | (data > 0)[:, None, None]


def other_positions(data, length):
    """Positions of another numbering than the segments': not the same comparison as indices."""
    i, j = index(length)
    batch = torch.arange(data.shape[0])[:, None, None, None]
    steps = torch.diff(data, prepend=data[:, :1] - 1, dim=-1)
    ids, positions = (steps != 1).cumsum(-1), data * data
    same = ids[batch, i] == ids[batch, j]
    return same & (positions[batch, j] <= positions[batch, i])


def rows_too(data, length):
    return causal_padding(data, length) & (data > 0)[:, None, :, None]


def dilated(data, length):
    i, j = index(length)
    return ((i - j) % 3 == 0) & (j <= i) & (data > 0)[:, None, None]


def written_afterwards(data, length):
    keys = (data > 0)[:, None, None].clone()
    mask = causal_padding(data, length) & keys
    keys[:] = True
    return mask


def written_into(data, length):
    mask = causal_padding(data, length).clone()
    mask[:, :, :, :3] = True
    return mask


KEYS, SEGMENTS, ELEMENTS = "key padding", "segments", "elements"
FORMS = [
    (causal_padding, Mask(True), KEYS),
    (window_padding, Mask(True, 0, 7), KEYS),
    (full_padding, Mask(), KEYS),
    (lambda data, length: (data > 0)[:, None, None], Mask(), KEYS),
    (lambda data, length: (data != 0).unsqueeze(1).unsqueeze(2).expand(-1, 1, length, -1), Mask(),
     KEYS),
    (packed, Mask(True), SEGMENTS),
    (documents, Mask(True), SEGMENTS),
    (padded_documents, Mask(True), f"{KEYS} + {SEGMENTS}"),
    (prefix, Mask(), ELEMENTS),
    (other_positions, Mask(), ELEMENTS),
    (rows_too, Mask(True), ELEMENTS),
    (dilated, Mask(), ELEMENTS),
    (written_afterwards, None, ELEMENTS),
    (written_into, None, ELEMENTS),
]  # fmt: skip


def attend(make):
    def function(q, k, v, data):
        mask = make(data, q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return function


def tensors(length=L, heads=2):
    return tuple(torch.randn(B, heads, length, 32) for _ in range(3))


def paddings(length):
    """What may come in the next call."""
    starts = torch.tensor([0, 9, 31])[:, None]
    at = torch.arange(length)[None]
    yield (at >= starts).long()
    yield (at < length - starts).long()
    yield torch.ones(B, length, dtype=torch.long)
    yield torch.zeros(B, length, dtype=torch.long)
    yield torch.randint(0, 3, (B, length))
    yield torch.where(at < starts, at, at - starts)  # position ids of two texts
    yield (at // 7 * torch.ones(B, 1)).long()


def planned(function, *args, compensation="none"):
    planner = Planner(compensation)
    with torch.no_grad():
        torch.compile(function, backend=planner, fullgraph=True)(*args)
    return planner


def rewritten(planner, policy_tensor):
    """The rewritten graph; its sites run dense, with the mask as the op gets it."""
    policy = policy_tensor(2, tau=1.0)[None]
    sites = planner.plan.sites
    return rewrite(planner.graph, sites, policy, selector="sub8", min_length=1000), policy


def run(planner, new, policy, args):
    named = dict(zip(("l_q_", "l_k_", "l_v_", "l_data_"), args, strict=True))
    names = [n.name for n in planner.graph.graph.nodes if n.op == "placeholder"]
    sizes = {"L": args[0].shape[2]}
    with torch.no_grad():
        (out,) = new(*(named.get(n, sizes["L"]) for n in names), policy)
    return out


@pytest.mark.parametrize(("make", "mask", "kind"), FORMS)
def test_what_a_mask_is_taken_for(make, mask, kind, policy_tensor):
    q, k, v = tensors()
    planner = planned(attend(make), q, k, v, next(paddings(L)))
    (site,) = planner.plan.sites
    assert not planner.plan.refused
    assert site.data.kind == kind
    if mask is not None:
        assert site.mask == mask
    new, policy = rewritten(planner, policy_tensor)
    for data in paddings(L):  # the graph was planned with the first one
        out = run(planner, new, policy, (q, k, v, data))
        want = attend(make)(q, k, v, data)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "mask", "kind"), FORMS[:8])
def test_symbolic_lengths(make, mask, kind, policy_tensor):
    q, k, _ = tensors()
    args = q, k, k, next(paddings(L))
    for x in args:
        torch._dynamo.mark_dynamic(x, 2 if x.dim() == 4 else 1)
    planner = planned(attend(make), *args)
    (site,) = planner.plan.sites
    assert site.data.kind == kind
    for rule in planner.plan.rules:
        assert rule.holds([77] * len(rule.sizes))
        if mask.causal:
            assert not replace(rule, mask=Mask(True, 1)).holds([77] * len(rule.sizes))


def test_a_mask_that_only_sizes_decide_may_have_any_form(policy_tensor):
    def function(q, k, v):
        i, j = index(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=i % 3 >= j % 5)

    planner = planned(function, *tensors())
    (site,) = planner.plan.sites
    assert (site.mask, site.data.kind) == (Mask(), ELEMENTS)


def test_refused_where_there_is_no_kernel():
    args = (*tensors(), next(paddings(L)))
    planner = planned(attend(causal_padding), *args, compensation="tangent")
    assert list(planner.plan.refused.values()) == [
        "no masks that depend on data with compensation 'tangent'"
    ]


def test_a_claim_that_is_wrong_on_the_real_values_is_dropped(monkeypatch):
    from afbs_compile.passes import data_masks

    split = data_masks.split

    def lying(mask, *rest):
        found = split(mask, *rest)
        return type(found)(found.data, [])  # forgets that the mask is causal

    monkeypatch.setattr(data_masks, "split", lying)
    (site,) = planned(attend(causal_padding), *tensors(), next(paddings(L))).plan.sites
    assert site.data.kind == ELEMENTS


def hidden_of(length):
    return ~torch.ones(length, length, dtype=torch.bool).tril()


def filled_in_place(q, k, v):
    hidden = hidden_of(q.shape[2])
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def written_beside(q, k, v):
    mask = ~hidden_of(q.shape[2])
    weights = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, 1.0)
    return F.scaled_dot_product_attention(q, k, weights @ v, attn_mask=mask)


def filled_and_read_again(q, k, v):
    hidden = hidden_of(q.shape[2])
    bias = torch.zeros_like(hidden, dtype=q.dtype)
    bias.masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("function", [filled_in_place, written_beside])
def test_a_write_that_a_mask_brings_along_or_has_nothing_to_do_with(function, policy_tensor):
    args = tensors()
    planner = planned(function, *args)
    (site,) = planner.plan.sites
    assert site.mask == Mask(True)
    assert not site.data
    new, policy = rewritten(planner, policy_tensor)
    out = run(planner, new, policy, (*args, None))
    torch.testing.assert_close(out, function(*args), atol=1e-5, rtol=1e-5)


def test_a_write_that_a_mask_does_not_bring_along(policy_tensor):
    """It has no program, but a value."""
    args = tensors()
    planner = planned(filled_and_read_again, *args)
    (site,) = planner.plan.sites
    assert site.data.kind == "bias"
    new, policy = rewritten(planner, policy_tensor)
    out = run(planner, new, policy, (*args, None))
    torch.testing.assert_close(out, filled_and_read_again(*args), atol=1e-5, rtol=1e-5)
