"""Torch's attention modules are laid open, compute the same, and are closed again if refused."""

import pytest
import torch
from torch import nn

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.modules import LAYER, MHA
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import rewrite

L, E, H = 40, 64, 2
OLD = torch.__version__ < "2.12"
CAUSAL, FULL = Mask(True), Mask()
causal_mask = nn.Transformer.generate_square_subsequent_mask
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attention(nn.Module):
    def __init__(self, weights=False, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(E, H, batch_first=True, **options)
        self.weights = weights

    def forward(self, x, **kwargs):
        out = self.inner(x, x, x, **kwargs)
        return out if self.weights else out[0]


class Causal(nn.Module):
    """A module under a mask that it makes from the length."""

    def __init__(self, inner, name="mask", hint="is_causal"):
        super().__init__()
        self.inner, self.names = inner, (name, hint)

    def forward(self, *args, **kwargs):
        name, hint = self.names
        return self.inner(*args, **{name: causal_mask(args[0].shape[1]), hint: True}, **kwargs)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def planned(model, *args, min_length=16, **kwargs):
    seen = []

    def planner(gm, inputs):
        seen.append((plan(gm, inputs, min_length), gm, gm.code, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=planner, fullgraph=True)(*args, **kwargs)
    return seen[-1]


def tokens():
    return torch.randn(3, L, E, generator=torch.Generator().manual_seed(0))


MODULES = [
    ("weights nobody reads", lambda: Attention(), {}, [FULL]),
    ("no weights", lambda: Attention(True), {"need_weights": False}, [FULL]),
    ("causal", lambda: Causal(Attention(), "attn_mask"), {"need_weights": False}, [CAUSAL]),
    ("a hint that is not needed", lambda: Causal(Attention(), "attn_mask"), {}, [CAUSAL]),
    ("a key of its own", lambda: Attention(add_bias_kv=True), {}, [FULL]),
    ("a key of zeros", lambda: Attention(add_zero_attn=True), {}, [FULL]),
    ("separate projections", lambda: Attention(kdim=E, vdim=E, bias=False), {}, [FULL]),
    ("encoder", lambda: encoder(), {}, [FULL] * 2),
    ("norm first", lambda: encoder(norm_first=True, activation="gelu"), {}, [FULL] * 2),
    ("causal encoder", lambda: Causal(encoder()), {}, [CAUSAL] * 2),
]


@pytest.mark.parametrize(("make", "kwargs", "masks"), [m[1:] for m in MODULES],
                         ids=[m[0] for m in MODULES])  # fmt: skip
@pytest.mark.parametrize("dynamic", [False, True])
def test_modules_are_laid_open(make, kwargs, masks, dynamic, policy_tensor):
    model, x = make().eval(), tokens()
    if dynamic:
        torch._dynamo.mark_dynamic(x, (0, 1))
        if OLD and any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
            pytest.skip("Dynamo itself does not trace this operator with symbolic sizes")
    found, gm, before, inputs = planned(model, x, **kwargs)
    assert not found.refused
    assert [s.mask for s in found.sites] == masks
    policy = policy_tensor(H, tau=1.0)[None].repeat(len(masks), 1, 1)
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=L + 2)
    inputs = [int(i) if isinstance(i, torch.SymInt) else i for i in inputs]
    with torch.no_grad():
        torch.testing.assert_close(new(*inputs, policy)[0], gm(*inputs)[0], atol=1e-5, rtol=1e-5)
    assert gm.code == before
    assert not {n.target for n in new.graph.nodes} & {MHA, LAYER}


def test_encoder_layers_have_one_name_in_training_and_in_inference():
    model = encoder(dropout=0.0)
    names = [
        [s.name for s in planned(model.train(mode), tokens())[0].sites] for mode in (False, True)
    ]
    assert names[0] == names[1] == ["layers.0.self_attn", "layers.1.self_attn"]


def test_a_decoder_attends_twice():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Transformer(E, H, 1, 1, 2 * E, batch_first=True)

        def forward(self, x):
            mask = causal_mask(x.shape[1])
            return self.inner(x, x[:, :20], tgt_mask=mask[:20, :20], tgt_is_causal=True)

    found = planned(Both().eval(), tokens())[0]
    assert [s.mask for s in found.sites] == [FULL, CAUSAL, FULL]


def test_padding_of_an_encoder(policy_tensor):
    """Rows that see nothing are NaN in its operator."""
    padding = torch.arange(L) >= torch.tensor([[L], [7], [0]])
    model = encoder().eval()
    found, gm, _, inputs = planned(model, tokens(), src_key_padding_mask=padding)
    assert [s.data.kind for s in found.sites] == ["key padding"] * 2
    policy = policy_tensor(H, tau=1.0)[None].repeat(2, 1, 1)
    new = rewrite(found.gm, found.sites, policy, selector="sub8", min_length=L + 2)
    with torch.no_grad():
        (out,), (want,) = new(*inputs, policy), gm(*inputs)
    assert want[2].isnan().all()
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5, equal_nan=True)


REFUSED = [
    (lambda: Attention(True), {}, {}, "attention weights are read: pass need_weights=False"),
    (lambda: Attention(dropout=0.1).train(), {}, {}, "dropout"),
    (lambda: encoder(), {}, {"min_length": 1000}, "short"),
]


@pytest.mark.parametrize(("make", "kwargs", "options", "reason"), REFUSED)
def test_refused_modules_are_left_as_they_were(make, kwargs, options, reason):
    model = make()
    if reason != "dropout":
        model.eval()
    found, gm, before, _ = planned(model, tokens(), **kwargs, **options)
    assert not found.sites
    assert all(why.startswith(reason) for why in found.refused.values())
    assert len(found.refused) == len([n for n in gm.graph.nodes if n.target in (MHA, LAYER)])
    assert gm.code == before
    assert [n.target for n in found.gm.graph.nodes] == [n.target for n in gm.graph.nodes]
