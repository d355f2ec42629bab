"""Attention inside a region is a site of its own, or stays as it is for a reason."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from afbs_compile.capture import Stream
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import guard
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

L, E, H = 40, 64, 2
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(E, 3 * E)

    def forward(self, x, mask=None):
        parts = self.inner(x).unflatten(-1, (H, 3 * E // H)).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2)


class Nested(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x, mask=None):
        return super().forward(x, mask)


class Chain(Layer):
    def forward(self, x, mask=None):
        q, k, v = self.inner(x).unflatten(-1, (H, 3 * E // H)).transpose(1, 2).chunk(3, -1)
        return x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Layers that run as they are, or each in a checkpoint, under a mask made outside."""

    def __init__(self, kind=Layer, checkpointed=False, masked=False, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.checkpointed, self.masked = checkpointed, masked

    def forward(self, x):
        mask = torch.ones(L, L, dtype=torch.bool).tril() if self.masked else None
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, mask, use_reentrant=False)
            else:
                x = layer(x, mask)
        return x


def tokens():
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(0))


def planned(model, *args):
    seen = []

    def planner(gm, inputs):
        seen.append((plan(gm, inputs, 16), gm, gm.code, inputs))
        return gm.forward

    torch.compile(model, backend=planner, fullgraph=True)(*args)
    return seen[-1]


def check(found, gm, inputs, policy_tensor, **tolerance):
    """The rewritten graph computes what the graph does."""
    policy = policy_tensor(H, tau=1.0)[None].repeat(len(found.sites), 1, 1)
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=L + 1)
    with torch.no_grad():
        out, want = new(*inputs, policy)[0], gm(*inputs)[0]
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want, **tolerance or {"atol": 1e-5, "rtol": 1e-5})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "checkpointed"), [(Layer, True), (Nested, False), (Chain, True), (Nested, True)]
)
def test_subgraphs_without_gradients(kind, checkpointed, masked, policy_tensor):
    model = Model(kind, checkpointed, masked)
    with torch.no_grad():
        found, gm, before, inputs = planned(model, tokens())
    assert not found.refused
    assert {s.mask for s in found.sites} == {Mask(masked and kind is not Chain)}
    assert len({s.name for s in found.sites}) == 3
    if not checkpointed:
        assert [s.name for s in found.sites] == ["layers.0", "layers.1", "layers.2"]
    check(found, gm, inputs, policy_tensor)
    assert gm.code == before


def saved(gm, inputs):
    """How many tensors the backward gets from the forward."""
    counts = []

    def forward(fw, _):
        counts.append(len(fw.graph.output_node().args[0]))
        return make_boxed_func(fw.forward)

    run = aot_module_simplified(
        gm, inputs, fw_compiler=forward, bw_compiler=lambda bw, _: make_boxed_func(bw.forward),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    out = run(*inputs)[0]
    return counts[0], torch.autograd.grad(
        out.square().sum(), [x for x in inputs if x.requires_grad]
    )


def test_a_checkpoint_still_drops_its_activations(monkeypatch):
    monkeypatch.setattr(guard, "no_backward", lambda device_type: None)
    found, gm, before, inputs = planned(Model(Layer, True), tokens())
    plain = planned(Model(Layer, False), tokens())
    assert not found.refused
    assert len(found.sites) == 3
    kept, want = saved(gm, inputs)
    count, got = saved(found.gm, inputs)
    assert count == kept < saved(plain[1], plain[3])[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert gm.code == before


def test_gradients_through_a_nested_region(monkeypatch):
    monkeypatch.setattr(guard, "no_backward", lambda device_type: None)
    found, gm, _, inputs = planned(Model(Nested), tokens())
    assert len(found.sites) == 3
    torch.testing.assert_close(saved(found.gm, inputs)[1], saved(gm, inputs)[1])


def test_selective_checkpoints_are_left_alone():
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    class Selective(Model):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
            return x

    found, gm, before, _ = planned(Selective(), tokens())
    assert list(found.refused.values()) == ["inside selective activation checkpointing"] * 3
    assert [n.target for n in found.gm.graph.nodes] == [n.target for n in gm.graph.nodes]
    assert gm.code == before


def test_subgraphs_without_attention_are_nobodys_business():
    class Plain(Layer):
        def forward(self, x, mask=None):
            return x + self.inner(x)[..., :E]

    with torch.no_grad():
        found, gm, _, _ = planned(Model(Plain, True), tokens())
    assert found.gm is gm


class Autocast(nn.Module):
    """A layer under autocast; `within` switches it off again around attention."""

    def __init__(self, within=True, dtype=torch.float32):
        super().__init__()
        self.layer, self.within, self.dtype = Model(layers=2), within, dtype

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layer(x)
            q = x.to(self.dtype).unflatten(-1, (H, E // H)).transpose(1, 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.within):
                return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("within", [True, False])
def test_autocast_is_what_it_is_for_sdpa(within, policy_tensor):
    with torch.no_grad():
        found, gm, _, inputs = planned(Autocast(within), tokens())
    assert not found.refused
    assert len(found.sites) == 3
    check(found, gm, inputs, policy_tensor, atol=0.02, rtol=0.02)


def test_float64_stays_float64_under_autocast():
    with torch.no_grad():
        found = planned(Autocast(dtype=torch.float64), tokens())[0]
    assert list(found.refused.values()) == ["no kernel for dtype torch.float64"]


def test_calibration_under_autocast_leaves_no_trace():
    with torch.no_grad():
        found, _, _, inputs = planned(Autocast(), tokens())
    stream = Stream(found.gm, inputs, found.sites)
    for site in [*found.sites, found.sites[0]]:
        layer = stream.layer(site.name)
        assert not torch.is_autocast_enabled("cpu")
        assert {x.dtype for x in (layer.q, layer.k, layer.v)} == {torch.bfloat16}
    del stream
    assert not torch.is_autocast_enabled("cpu")
    assert torch.clear_autocast_cache() is None


def kernels(*choices):
    def function(q, k, v):
        if not choices:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(list(choices[0])):
            return kernels(*choices[1:])(q, k, v)

    return function


MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(
    ("choices", "kept"),
    [([[MATH]], True), ([[FLASH]], False), ([[MATH, FLASH]], False),
     ([[FLASH], [MATH]], True), ([[MATH], [FLASH]], False)],
)  # fmt: skip
def test_a_choice_of_kernels_is_kept_to(choices, kept):
    x = torch.randn(2, H, L, 32)
    found = planned(kernels(*choices), x, x, x)[0]
    assert [*found.refused.values()] == ["inside sdpa_kernel without a fused kernel"] * kept
    assert len(found.sites) == (not kept)


def test_a_choice_ends_with_its_region():
    def function(q, k, v):
        return kernels()(kernels([MATH])(q, k, v), k, v)

    x = torch.randn(2, H, L, 32)
    found = planned(function, x, x, x)[0]
    assert (list(found.refused), [s.name for s in found.sites]) == (["function"], ["function#1"])
    flags = torch.nn.attention._cur_sdpa_kernel_backends()
    stream = Stream(found.gm, [x, x, x][: len(found.gm.graph.find_nodes(op="placeholder"))],
                    found.sites)  # fmt: skip
    stream.layer("function#1")
    assert torch.nn.attention._cur_sdpa_kernel_backends() == flags
