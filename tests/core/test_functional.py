"""`afbs_compile.attention`: equal to SDPA if nothing is skipped, SDPA if it cannot run."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import afbs_compile
from afbs_compile import functional
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import Head, PolicyError, Site, bucket_of
from afbs_compile.report import JOURNAL

SITE = "layers.0.attn"
FEW = {"min_length": 1}


@pytest.fixture(autouse=True)
def clean():
    JOURNAL.clear()
    functional.logs.warn_once.cache_clear()
    yield
    JOURNAL.clear()


def tensors(batch=2, heads=4, kv_heads=2, length=300, keys=None, dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    sizes = ((heads, length), (kv_heads, keys or length), (kv_heads, keys or length))
    return [torch.randn(batch, h, n, dim, generator=generator).to(dtype) for h, n in sizes]


@pytest.fixture
def two_heads(policy, tuning):
    """A policy of one site with four heads, at the length of `tensors`."""
    made = tuning(length=300)
    heads = tuple(Head("sparse", tau) for tau in (0.3, 0.5, 0.7, 0.9))
    site = Site(SITE, heads, 2, 32, "causal", "sparse")
    return policy(replace(made, sites={SITE: site}))


def last():
    return afbs_compile.explain().sites[-1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        pytest.param({"length": 257, "keys": 411}, marks=pytest.mark.slow),
        pytest.param({"kv_heads": 4, "batch": 1}, marks=pytest.mark.slow),
    ],
)
def test_everything_kept_is_sdpa(causal, sizes):
    q, k, v = tensors(**sizes)
    keywords = {"is_causal": causal, "enable_gqa": True, "scale": 0.3}
    ours = afbs_compile.attention(q, k, v, **keywords, tau=1.0, **FEW)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **keywords),
                               atol=1e-5, rtol=1e-5)  # fmt: skip
    assert (last().decision, last().decided_by) == ("sparse", "fixed: tau=1.0, not measured")
    assert last().kernel == "FlexAttention"


@pytest.mark.parametrize("shape", [(300, 300), (2, 1, 1, 300), (2, 4, 300, 300)])
def test_a_boolean_mask_is_kept_exactly(shape):
    q, k, v = tensors()
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) > 0.3
    ours = afbs_compile.attention(q, k, v, mask, enable_gqa=True, tau=1.0, **FEW)
    want = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
    assert last().decision == "sparse"


def test_a_site_of_a_policy_gives_its_thresholds(two_heads, tmp_path):
    q, k, v = tensors()
    keywords = {"is_causal": True, "enable_gqa": True, **FEW}
    ours = afbs_compile.attention(q, k, v, **keywords, policy=two_heads, site=SITE)
    for n, tau in enumerate((0.3, 0.5, 0.7, 0.9)):
        alone = afbs_compile.attention(q, k, v, **keywords, tau=tau)
        torch.testing.assert_close(ours[:, n], alone[:, n], atol=1e-6, rtol=1e-5)
    assert not torch.equal(ours[:, 0], afbs_compile.attention(q, k, v, **keywords, tau=0.9)[:, 0])
    file = tmp_path / "policy.json"
    file.write_text(two_heads.to_json())
    assert torch.equal(
        ours, afbs_compile.attention(q, k, v, **keywords, policy=str(file), site=SITE)
    )


def test_a_changed_policy_file_is_read_again(two_heads, tmp_path):
    q, k, v = tensors()
    file = tmp_path / "policy.json"
    keywords = {"is_causal": True, "enable_gqa": True, "policy": file, "site": SITE, **FEW}
    outs = []
    for n, tau in enumerate((0.2, 1.0)):
        (made,) = two_heads.tunings
        site = replace(made.sites[SITE], heads=(Head("sparse", tau),) * 4)
        changed = replace(two_heads, tunings=(replace(made, sites={SITE: site}),))
        file.write_text(changed.to_json())
        os.utime(file, ns=(n, n))
        outs.append(afbs_compile.attention(q, k, v, **keywords))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(outs[1], dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outs[0], dense, atol=1e-3)


REFUSED = [
    ("additive float mask", {"attn_mask": torch.zeros(300, 300)}),
    ("dropout", {"dropout_p": 0.5}),
    ("short: 300 queries, min_length is 301", {"min_length": 301}),
]


@pytest.mark.parametrize(("reason", "keywords"), REFUSED)
def test_what_cannot_be_done_is_sdpa_and_counted(reason, keywords):
    q, k, v = tensors()
    plain = {n: x for n, x in keywords.items() if n != "min_length"}
    for _ in range(3):
        torch.manual_seed(1)
        ours = afbs_compile.attention(q, k, v, enable_gqa=True, tau=0.5, **(FEW | keywords))
    torch.manual_seed(1)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **plain))
    assert afbs_compile.explain().reasons == {reason: 3}
    assert (last().decision, last().calls) == ("refused", 3)


def test_shapes_and_dtypes_without_a_kernel_are_sdpa():
    for sizes in ({"dim": 16}, {"dtype": torch.float64}):
        q, k, v = tensors(**sizes)
        assert torch.equal(
            afbs_compile.attention(q, k, v, enable_gqa=True, tau=0.5, **FEW),
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        )
    q, k, v = tensors()
    wide = afbs_compile.attention(q, k[:1], v[:1], enable_gqa=True, tau=0.5, **FEW)
    torch.testing.assert_close(
        wide, F.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:1].expand_as(v),
                                             enable_gqa=True))  # fmt: skip
    rows = afbs_compile.attention(q[0, :2], k[0], v[0], tau=0.5, **FEW)
    torch.testing.assert_close(rows, F.scaled_dot_product_attention(q[0, :2], k[0], v[0]))
    assert sum(afbs_compile.explain().reasons.values()) == 4


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_vmap_and_forward_derivatives_are_sdpas():
    q, k, v = tensors(kv_heads=4)
    call = lambda q: afbs_compile.attention(q, k, v, tau=0.5, **FEW)
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        want = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(torch.vmap(call)(q[None])[0], want)
        out = call(forward_ad.make_dual(q, torch.ones_like(q)))
        assert forward_ad.unpack_dual(out).tangent is not None
    assert set(afbs_compile.explain().reasons) == {"inside vmap", "forward-mode derivatives"}


def test_gradients_are_sdpas_if_everything_is_kept():
    q, k, v = (x.requires_grad_() for x in tensors(kv_heads=4))
    afbs_compile.attention(q, k, v, tau=1.0, is_causal=True, **FEW).sum().backward()
    ours = q.grad.clone()
    q.grad = None
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    torch.testing.assert_close(ours, q.grad, atol=1e-5, rtol=1e-4)
    assert last().decision == "sparse"


def test_a_length_or_head_count_that_the_policy_lacks_is_sdpa(two_heads):
    q, k, v = tensors(length=600)
    afbs_compile.attention(q, k, v, enable_gqa=True, policy=two_heads, site=SITE, **FEW)
    q, k, v = tensors(heads=2)
    afbs_compile.attention(q, k, v, enable_gqa=True, policy=two_heads, site=SITE, **FEW)
    assert set(afbs_compile.explain().reasons) == {
        "the policy has no tuning for 600 tokens",
        "the policy is for 4 heads, the call has 2",
    }


def test_wrong_uses_say_what_is_needed(two_heads, tmp_path):
    q, k, v = tensors(kv_heads=4)
    with pytest.raises(ValueError, match="give site="):
        afbs_compile.attention(q, k, v, policy=two_heads)
    with pytest.raises(ValueError, match=f"it has {SITE}"):
        afbs_compile.attention(q, k, v, policy=two_heads, site="elsewhere")
    with pytest.raises(ValueError, match="no tau="):
        afbs_compile.attention(q, k, v, policy=two_heads, site=SITE, tau=0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        afbs_compile.attention(q, k, v, tau=1.5)
    with pytest.raises(PolicyError, match="cannot be read"):
        afbs_compile.attention(q, k, v, policy=tmp_path / "nowhere.json", site=SITE)


def test_a_threshold_that_nobody_chose_is_said_once():
    q, k, v = tensors(kv_heads=4)
    with pytest.warns(AfbsWarning, match="not measured") as caught:
        [afbs_compile.attention(q, k, v) for _ in range(2)]
    assert len(caught) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_without_a_break_and_at_any_length(two_heads, tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(two_heads.to_json())
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    def block(q, k, v):
        return afbs_compile.attention(
            q * 1, k, v, is_causal=True, enable_gqa=True, policy=str(file), site=SITE, **FEW
        ) + 1  # fmt: skip

    compiled = torch.compile(block, backend=keep, fullgraph=True, dynamic=True)
    for length in (300, 310, 290):
        q, k, v = tensors(length=length)
        torch.testing.assert_close(compiled(q, k, v), block(q, k, v))
    assert len(graphs) == 1
    assert bucket_of(290) == bucket_of(310) == bucket_of(300)
    q, k, v = tensors(length=600)  # no tuning: every block is kept
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(compiled(q, k, v) - 1, dense, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_the_op_of_policies_keeps_torchs_rules():
    from afbs_compile.policy_op import fixed_source

    k = tensors()[1]
    torch.library.opcheck(torch.ops.afbs.policy_of.default, (k, fixed_source(0.5), 4))
