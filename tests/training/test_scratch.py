"""A policy of budgets finds its layers, and its model trains sparse from the first step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile import backend, runner
from afbs_compile.policy import Policy, bucket_of
from afbs_compile.report import JOURNAL, explain
from afbs_compile.training.scratch import Attention, budget_policy
from afbs_compile.weights import LAYERS

SHAPE = Attention(2, 1, 32)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 128)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2)
                   for t in self.qkv(x).split([64, 32, 32], -1))  # fmt: skip
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + o.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = Attends()

    def forward(self, x):
        return self.inside(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


SITES = {"0.inside": SHAPE, "1.inside": SHAPE}


def test_every_length_has_a_tuning(model):
    policy = budget_policy(model, SITES, 0.25, 3000)
    again = Policy.from_json(policy.to_json())
    assert again == policy
    for length in (100, 128, 129, 1000, 2049, 3000, 4096):
        found = policy.find_any(bucket_of(length)) or policy.find_longer(length)
        assert {h.budget for site in found.sites.values() for h in site.heads} == {0.25}
    assert policy.find_any(bucket_of(5000)) is None
    assert policy.find_longer(5000) is None


def test_another_dtype_is_another_key(model):
    plain, half = (budget_policy(model, SITES, 0.5, 512, d) for d in (None, torch.bfloat16))
    keys = [p.tunings[0].sites["0.inside"].weights for p in (plain, half)]
    cast = budget_policy(model.bfloat16(), SITES, 0.5, 512)
    assert keys[0] != keys[1] == cast.tunings[0].sites["0.inside"].weights
    assert half.model == cast.model


@pytest.mark.usefixtures("fresh_dynamo", "uncompiled")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path")
# Dynamo looks at the gradient of what it is given
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("scope", ["whole", "block"])
def test_a_compiled_model_follows_it(model, scope, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    monkeypatch.setattr(runner, "later", lambda gm, dynamic, options: gm.forward)
    LAYERS.clear()
    JOURNAL.clear()
    path = tmp_path / "policy.json"
    path.write_text(budget_policy(model, SITES, 0.3, 512).to_json())
    options = {"policy": str(path), "min_length": 128}
    x = torch.randn(1, 512, 64)
    dense = model(x)
    if scope == "whole":
        run = torch.compile(model, backend="afbs", options=options)
    else:
        run = model
        for block in model:
            block.compile(backend="afbs", options=options)
    loss = run(x).square().mean()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert explain().rewritten == 2
    assert not torch.allclose(run(x), dense, atol=1e-3)
    assert afbs_compile.set_budget(model, dict.fromkeys(SITES, 1.0)) == 2
    torch.testing.assert_close(run(x), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("sites", "longest", "says"),
    [({}, 512, "0 sites"), (SITES, 0, "longest is 0"), ({"2": SHAPE}, 512, "no weights")],
)
def test_what_cannot_be_is_refused(model, sites, longest, says):
    model.append(nn.SiLU())
    with pytest.raises(ValueError, match=says):
        budget_policy(model, sites, 0.5, longest)
