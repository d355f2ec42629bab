"""Plans for graphs as Dynamo makes them: what is rewritten, what is refused and why."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import guard
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

L = 64
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Planner:
    """A backend that plans and runs eagerly."""

    def __init__(self, min_length=16):
        self.plans, self.graphs, self.min_length = [], [], min_length

    def __call__(self, gm, example_inputs):
        self.plans.append(plan(gm, example_inputs, self.min_length))
        self.graphs.append(gm)
        return gm.forward


def planned(function, *args, dynamic=None, **kwargs):
    planner = Planner()
    with torch.no_grad():
        torch.compile(function, backend=planner, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    return planner.plans[-1]


def tensors(heads=4, kv_heads=4, length_k=L, dim=32):
    return (torch.randn(2, heads, L, dim), *(torch.randn(2, kv_heads, length_k, dim),) * 2)


def sdpa(**kwargs):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def with_mask(make):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=make(q, k))


def index(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def causal(q, k):
    i, j = index(q, k)
    return (j <= i)[None, None].expand(q.shape[0], 1, -1, -1)


def window(q, k):
    i, j = index(q, k)
    return (j <= i) & (j > i - 24)


def right_aligned(q, k):
    i, j = index(q, k)
    return j <= i + (k.shape[2] - q.shape[2])


ACCEPTED = [
    (sdpa(), {}, Mask()),
    (sdpa(is_causal=True), {}, Mask(True)),
    (sdpa(is_causal=True, enable_gqa=True), {"kv_heads": 2}, Mask(True)),
    (with_mask(causal), {}, Mask(True)),
    (with_mask(window), {}, Mask(True, 0, 24)),
    (with_mask(right_aligned), {"length_k": 100}, Mask(True, 36)),
    (with_mask(lambda q, k: torch.ones(L, L, dtype=torch.bool)), {}, Mask()),
    (with_mask(lambda q, k: torch.ones(L, L, dtype=torch.bool).tril()), {}, Mask(True)),
    (with_mask(lambda q, k: torch.zeros(L, L)), {}, Mask()),
    (with_mask(lambda q, k: torch.full((L, L), -1e9).triu(1)), {}, Mask(True)),
    (with_mask(lambda q, k: torch.ones(1, L, dtype=torch.bool)), {}, Mask()),
]


@pytest.mark.parametrize(("function", "shape", "mask"), ACCEPTED)
def test_accepted(function, shape, mask):
    found = planned(function, *tensors(**shape))
    assert not found.refused
    (site,) = found.sites
    assert (site.mask, site.heads, site.head_dim) == (mask, 4, 32)
    assert site.kv_heads == shape.get("kv_heads", 4)


def vmapped(q, k, v):
    return torch.vmap(F.scaled_dot_product_attention)(q[None], k[None], v[None])


def chosen_kernel(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


REFUSED = [
    (sdpa(dropout_p=0.5), {}, "dropout"),
    pytest.param(
        vmapped, {}, "inside vmap",
        marks=pytest.mark.filterwarnings("ignore:There is a performance drop"),
    ),
    (chosen_kernel, {}, "inside sdpa_kernel"),
    (sdpa(), {"dim": 16}, "head dim 16"),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :16]), {}, "value head dim"),
    (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :8], k, v), {}, "short: 8 queries"),
    (lambda q, k, v: F.scaled_dot_product_attention(*(x.double() for x in (q, k, v))), {},
     "dtype torch.float64"),
]  # fmt: skip


BIASES = [
    lambda q, k: torch.ones(L, L).tril(),
    lambda q, k: torch.full((L, L), -1e9).triu(),  # with rows that see nothing
    lambda q, k: q[0, 0] @ k[0, 0].T,
]


@pytest.mark.parametrize("make", BIASES)
def test_other_float_masks_are_added(make, policy_tensor):
    planner, args = Planner(), [torch.randn(2, 4, L, 32) for _ in range(3)]
    function = with_mask(make)
    with torch.no_grad():
        want = torch.compile(function, backend=planner, fullgraph=True)(*args)
    found = planner.plans[-1]
    (site,) = found.sites
    assert (site.mask, site.data.kind) == (Mask(), "bias")
    policy = policy_tensor(4, tau=1.0)[None]
    new = rewrite(found.gm, [site], policy, selector="sub8", min_length=L + 1)
    with torch.no_grad():
        torch.testing.assert_close(new(*args, policy)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("function", "shape", "reason"), REFUSED)
def test_refused_with_its_reason(function, shape, reason):
    found = planned(function, *tensors(**shape))
    assert not found.sites
    (why,) = found.refused.values()
    assert reason in why


def test_gradients_are_refused_where_there_is_no_backward(monkeypatch):
    monkeypatch.setattr(guard, "no_backward", lambda device_type: "no backward here")
    planner = Planner()
    q, k, v = tensors()
    out = torch.compile(sdpa(), backend=planner)(q.requires_grad_(), k, v)
    out.sum().backward()
    (why,) = planner.plans[0].refused.values()
    assert "needs gradients" in why


def repeat_expand(x, n):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, n, length, dim).reshape(batch, -1, length, dim)


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x, n: repeat_expand(x, n),
        lambda x, n: x.repeat_interleave(n, 1),
        lambda x, n: torch.repeat_interleave(x, n, dim=1),
        lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2),
    ],
)
def test_repeated_heads_are_undone(repeat):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k, 2), repeat(v, 2), is_causal=True)

    (site,) = planned(function, *tensors(kv_heads=2)).sites
    assert (site.heads, site.kv_heads) == (4, 2)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: torch.cat([x, x], 1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, L, 32),
        lambda x: x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=4),
    ],
)
def test_other_repetitions_are_not(other):
    """Tiled heads are in another order than grouped ones: undoing them would be wrong."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, other(k), other(v), is_causal=True)

    for site in planned(function, *tensors(kv_heads=2)).sites:
        assert site.kv_heads == 4


def test_symbolic_lengths_carry_a_rule():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window(q, k))

    q, k, v = tensors()
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    (rule,) = planned(function, q, k, v).rules
    assert rule.holds([100] * len(rule.sizes))
    assert not type(rule)(rule.program, Mask(True), False).holds([100] * len(rule.sizes))


@pytest.mark.parametrize(("function", "shape", "mask"), ACCEPTED)
def test_rewritten_graphs_compute_the_same(function, shape, mask, policy_tensor):
    planner, args = Planner(), tensors(**shape)
    with torch.no_grad():
        want = torch.compile(function, backend=planner, fullgraph=True)(*args)
        (gm,), (found,) = planner.graphs, planner.plans
        before = gm.code
        policy = policy_tensor(4, tau=1.0)[None]
        new = rewrite(gm, found.sites, policy, selector="sub8", min_length=1,
                      compensation="tangent")  # fmt: skip
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        inputs = dict(zip(("l_q_", "l_k_", "l_v_"), args, strict=True))
        (out,) = new(*(inputs[n] for n in names), policy)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert gm.code == before
    targets = [n.target for n in new.graph.nodes]
    assert torch.ops.afbs.attention.default in targets
    assert F.scaled_dot_product_attention not in targets


def test_graphs_without_recorded_shapes_are_refused():
    gm = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    found = plan(gm, tensors(), 16)
    assert list(found.refused.values()) == ["shapes are not recorded in the graph"]
