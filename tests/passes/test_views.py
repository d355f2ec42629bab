"""SDPA on three axes, or by a kernel's name, is SDPA on four; heads keep their policies."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

B, H, L, D = 2, 3, 40, 32
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def flat(x):
    return x.reshape(B * H, L, D)


def lower_triangle(*lead):
    return torch.ones(*lead, L, L, dtype=torch.bool).tril()


def views(q, k, v):
    return F.scaled_dot_product_attention(flat(q), flat(k), flat(v), is_causal=True)


def views_under_a_mask(q, k, v):
    mask = lower_triangle(B * H)
    return F.scaled_dot_product_attention(flat(q), flat(k), flat(v), mask)


def views_under_one_mask(q, k, v):
    return F.scaled_dot_product_attention(flat(q), flat(k), flat(v), lower_triangle(1))


def one_head(q, k, v):
    return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], lower_triangle(B), scale=0.3)


def unbatched(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0], lower_triangle())


def by_name(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)[0]


def by_overload(q, k, v):
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    mask = torch.full((1, 1, L, L), float("-inf")).triu(1)
    return kernel(q, k, v, 0.0, False, attn_mask=mask, scale=0.2)[0]


def with_statistics(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


@pytest.mark.parametrize(
    ("function", "heads"),
    [
        (by_name, H),
        (by_overload, H),
        (views, H),
        (views_under_a_mask, H),
        (views_under_one_mask, H),
        (one_head, 1),
        (unbatched, 1),
    ],
)
def test_three_axes_become_four(function, heads, policy_tensor):
    seen = []

    def planner(gm, inputs):
        seen.append((plan(gm, inputs, 16), gm, inputs))
        return gm.forward

    args = tuple(torch.randn(B, H, L, D) for _ in range(3))
    with torch.no_grad():
        torch.compile(function, backend=planner, fullgraph=True)(*args)
        ((found, gm, inputs),) = seen
        assert not found.refused
        (site,) = found.sites
        assert site.heads == heads
        assert site.mask.causal
        policy = policy_tensor(heads, tau=1.0)[None]
        new = rewrite(
            found.gm, found.sites, policy, selector="sub8", min_length=L + 1
        )  # dense inside
        torch.testing.assert_close(new(*inputs, policy)[0], gm(*inputs)[0], atol=1e-5, rtol=1e-5)


def test_a_kernel_whose_statistics_are_read_stays():
    seen = []
    args = [torch.randn(B, H, L, D) for _ in range(3)]
    torch.compile(
        with_statistics, backend=lambda gm, x: seen.append(plan(gm, x, 16)) or gm.forward
    )(*args)
    assert list(seen[0].refused.values()) == ["log-sum-exps of a fused kernel are read"]


def test_a_refused_call_stays_on_three_axes():
    seen = []

    def planner(gm, inputs):
        seen.append((plan(gm, inputs, 1000), gm.code, gm))
        return gm.forward

    torch.compile(views, backend=planner)(*(torch.randn(B, H, L, D) for _ in range(3)))
    ((found, code, gm),) = seen
    assert "short" in next(iter(found.refused.values()))
    assert gm.code == code
    assert [n.target for n in found.gm.graph.nodes] == [n.target for n in gm.graph.nodes]
