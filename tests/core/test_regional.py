"""One graph, many layers: each acts by its own policy and budget; nothing compiles again."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import afbs_compile
from afbs_compile import backend, calibrate, runner
from afbs_compile.identity import model_key, rows_of
from afbs_compile.kernels import flex, reference
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.selection import select
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import Head, Policy, Site, Tuning, bucket_of
from afbs_compile.policy_tensor import to_tensor
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.timing import Speed
from afbs_compile.weights import LAYERS as LAYERS_KNOWN
from afbs_compile.weights import site_keys

LENGTH, LAYERS, HEADS, DIM = 328, 12, 2, 32
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "uncompiled", "clean"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path"),
    # Dynamo looks at the gradient of what it is given
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Block(nn.Module):
    """Causal self-attention with a residual."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.qkv.weight.data *= 3

    def project(self, x):
        return [
            t.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for t in self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        ]

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.project(x), is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers=LAYERS):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def clean():
    JOURNAL.clear()
    RUNNERS.clear()
    LAYERS_KNOWN.clear()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    JOURNAL.clear()


def plainly(*args, beside=None, masked=None, **site):
    return reference.forward(*args, **site)[0]


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs and kernels run as they are written."""
    monkeypatch.setattr(flex, "forward", plainly)
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    monkeypatch.setattr(runner, "later", lambda gm, dynamic, options: gm.forward)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def tokens(length=LENGTH):
    return torch.randn(1, length, HEADS * DIM, generator=torch.Generator().manual_seed(1))


def policy_of(model, taus, length=LENGTH, dense=(), **changes):
    """A whole model's policy, with a tau for each layer."""
    sites = {}
    for n, (block, tau) in enumerate(zip(model.layers, taus, strict=True)):
        name = f"layers.{n}"
        weights = site_keys(rows_of(block.named_parameters()), ["function"])["function"]
        heads = (Head("sparse", tau, sink=64, neighbours=0, density=0.4 + n / 30),) * HEADS
        decision = "dense" if n in dense else "sparse"
        sites[name] = Site(name, heads, HEADS, DIM, "causal", decision, weights=weights)
    tuning = Tuning(
        bucket_of(length), length, {}, True, 0, 0.0, 0.0, "", "cpu", {}, (), sites, **changes
    )
    return Policy(model_key(model.named_parameters()), None, (tuning,))


def oracle(model, x, policies):
    """Every layer by the reference, with its own policy tensor; None is dense."""
    for block, policy in zip(model.layers, policies, strict=True):
        q, k, v = block.project(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if policy is not None:
            site = {"mask": Mask(True), "scale": DIM**-0.5, "block_m": 64, "block_n": 64}
            lists = select(q, k, policy, selector="sub8", **site)
            out, _ = reference.forward(q, k, v, *lists, policy, **site)
        x = x + block.out(out.transpose(1, 2).flatten(2))
    return x


def tensors(policy, budgets=None):
    sites = [policy.tunings[0].sites[f"layers.{n}"] for n in range(LAYERS)]
    if budgets:
        sites = [replace(site, heads=tuple(replace(h, budget=b) for h in site.heads))
                 for site, b in zip(sites, budgets, strict=True)]  # fmt: skip
    return [to_tensor(site) if site.decision == "sparse" else None for site in sites]


TAUS = [0.1 + n / 15 for n in range(LAYERS)]


def by_block(model, file, **options):
    for block in model.layers:
        block.compile(backend="afbs", options={"min_length": 128, "policy": str(file)} | options)
    return model


def whole(model, file, **options):
    options = {"min_length": 128, "policy": str(file)} | options
    return torch.compile(model, backend="afbs", options=options)


WAYS = pytest.mark.parametrize("way", [by_block, whole])


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "policy.json"


@WAYS
@torch.no_grad()
def test_twelve_policies_act_as_twelve(model, file, way):
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    x = tokens()
    want = oracle(model, x, tensors(policy))
    one = oracle(model, x, tensors(policy)[:1] * LAYERS)
    got = way(model, file)(x)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one, want, atol=1e-2), "one policy for all would do as well"
    assert afbs_compile.explain().rewritten == LAYERS
    assert len({site.name for site in afbs_compile.explain().sites}) == LAYERS


@torch.no_grad()
def test_no_more_graphs_than_without_us(model, file):
    file.write_text(policy_of(model, TAUS).to_json())
    for block in model.layers:
        block.compile(backend="eager")
    model(tokens()), model(tokens(350))
    without = graphs()
    torch._dynamo.reset()
    counters.clear()
    ours = by_block(model, file)
    ours(tokens()), ours(tokens(350))
    assert graphs() == without


@torch.no_grad()
def test_layers_may_have_other_sparse_sites_than_the_first(model, file):
    policy = policy_of(model, TAUS, dense={0, 5, 11})
    file.write_text(policy.to_json())
    x = tokens()
    want = oracle(model, x, tensors(policy))
    torch.testing.assert_close(by_block(model, file)(x), want, atol=1e-4, rtol=1e-4)


@WAYS
@torch.no_grad()
def test_budgets_change_without_a_graph(model, file, way):
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    x, run = tokens(), way(model, file)
    tuned = run(x)
    before = graphs()
    for step in range(50):
        budgets = {f"layers.{n}": 0.2 + ((step + n) % 12) / 20 for n in range(LAYERS)}
        target = model if step % 2 else policy.model
        assert afbs_compile.set_budget(target, budgets) == LAYERS
        got = run(x)
    assert graphs() == before
    want = oracle(model, x, tensors(policy, budgets.values()))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, tuned, atol=1e-2)
    assert afbs_compile.set_budget(model, dict.fromkeys(budgets)) == LAYERS
    torch.testing.assert_close(run(x), tuned)


@torch.no_grad()
def test_budgets_hold_at_other_lengths(model, file):
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    run = by_block(model, file)
    run(tokens())
    budgets = [0.3 + n / 30 for n in range(LAYERS)]
    afbs_compile.set_budget(model, {f"layers.{n}": b for n, b in enumerate(budgets)})
    x = tokens(380)
    want = oracle(model, x, tensors(policy, budgets))
    torch.testing.assert_close(run(x), want, atol=1e-4, rtol=1e-4)


def test_budgets_are_checked(model, file):
    file.write_text(policy_of(model, TAUS).to_json())
    with torch.no_grad():
        by_block(model, file)(tokens())
    for wrong in (0, -0.5, 1.5, "0.5", [0.5, 2.0], []):
        with pytest.raises(ValueError, match=r"'layers.0'.*above 0, at most 1"):
            afbs_compile.set_budget(model, {"layers.0": wrong})
    with pytest.raises(ValueError, match="3 budgets for the 2 heads"):
        afbs_compile.set_budget(model, {"layers.0": [0.5] * 3})
    with pytest.warns(AfbsWarning, match="no site called layers.99 has run in the model"):
        assert afbs_compile.set_budget(model, {"layers.99": 0.5, "layers.1": [0.5, 0.25]}) == 1
    with pytest.warns(AfbsWarning, match="it has none"):
        assert afbs_compile.set_budget(Model(1), {"layers.0": 0.5}) == 0


@torch.no_grad()
def test_every_block_is_tuned_on_what_it_sees(model, monkeypatch):
    """Without a policy file each block has a document of its own."""
    monkeypatch.setattr(calibrate, "measure", lambda *_: Speed(1.0, 0.0, 0.5))
    del model.layers[3:]
    for block in model.layers:
        block.compile(backend="afbs", options={"min_length": 128, "max_error": 0.3})
    x = tokens()
    out = model(x)
    made = [Policy.read(c.policy_path) for c in afbs_compile.explain().calibrations]
    assert len({policy.model for policy in made}) == 3
    (sites,) = zip(*[p.tunings[0].sites.values() for p in made], strict=True)
    want = oracle(model, x, [to_tensor(site) for site in sites])
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    names = [site.name for site in afbs_compile.explain().sites]
    assert names[0] == "function"
    assert all(re.fullmatch(r"[0-9a-f]{8}:function", name) for name in names[1:])


@torch.no_grad()
def test_a_policy_of_all_is_taken_by_blocks_that_run(model, file):
    other = policy_of(model, [1.0] * LAYERS)
    file.write_text(policy_of(model, TAUS).to_json())
    run, x = by_block(model, file), tokens()
    run(x)
    assert afbs_compile.use_policy(other) == 1
    torch.testing.assert_close(run(x), oracle(model, x, [None] * LAYERS), atol=1e-4, rtol=1e-4)


def test_trained_layers_stay_who_they_are(model, file):
    """New lengths come after steps that changed the weights: the policy file still fits."""
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    run = by_block(model, file, rule="tau")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for length in (LENGTH, 350, 370):
        run(tokens(length)).square().mean().backward()
        optimizer.step()
    x = tokens(384)
    torch.testing.assert_close(run(x), oracle(model, x, tensors(policy)), atol=1e-3, rtol=1e-3)


def test_training_takes_the_density_as_budget(model, file):
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    x = tokens()
    got = by_block(model, file)(x)
    budgets = [0.4 + n / 30 for n in range(LAYERS)]
    want = oracle(model, x, tensors(policy, budgets))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        tau = oracle(model, x, tensors(policy))
        torch.testing.assert_close(model(x), tau, atol=1e-4, rtol=1e-4)
    got.square().mean().backward()
    mine = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    want.square().mean().backward()
    for ours, theirs in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-5, rtol=1e-3)


def test_other_weights_in_the_same_parameters_are_another_layer(model, file):
    policy = policy_of(model, TAUS)
    file.write_text(policy.to_json())
    with torch.no_grad():
        by_block(model, file)(tokens())
        torch._dynamo.reset()
        for weight in model.parameters():
            weight.mul_(1.5)
        with pytest.warns(AfbsWarning, match="the weights differ"):
            got = model(tokens())
        torch.testing.assert_close(got, oracle(model, tokens(), [None] * LAYERS))
