"""Is the damage what dense and sparse logits say it is?"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

import afbs_compile
from afbs_compile import calibrate
from afbs_compile.damage import (
    Damage,
    Judge,
    Limits,
    Unmeasurable,
    compare,
    divergence,
    logits_of,
    next_tokens,
    reading,
)
from afbs_compile.kernels import reference
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.selection import select
from afbs_compile.passes.plan import plan
from afbs_compile.policy import Head
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.policy_tensor import to_tensor
from afbs_compile.timing import Speed

VOCABULARY = 97


class Model(torch.nn.Module):
    """Embedding, one causal attention of two heads, logits."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 64)
        self.head = torch.nn.Linear(64, VOCABULARY)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        q = x.unflatten(-1, (2, 32)).transpose(1, 2)
        o = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.head(o.transpose(1, 2).flatten(2)), x


def traced(model, *inputs):
    """The model's graph and its inputs as a backend sees them."""
    seen = []

    def backend(gm, args):
        seen.append((gm, args))
        return lambda *real: seen.append(real) or gm(*real)

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(*inputs)
    (gm, _), real = seen
    return gm, list(real)


def judge(seed=0, **options):
    torch.manual_seed(seed)
    model = Model().eval()
    ids = torch.randint(0, VOCABULARY, (1, 512))
    gm, args = traced(model, ids)
    found = plan(gm, args, 1).sites
    made = Judge(gm, [args], found, selector="sub8", **{"perplexity": True} | options)
    return made, found, model, ids


def policy_of(site, head):
    return SitePolicy(site.name, (head,) * 2, 2, 32, "causal", "sparse")


def test_nothing_left_out_does_no_damage():
    measure, (site,), _, _ = judge()
    assert measure({}).kl < 1e-7  # the op instead of SDPA
    damage = measure({site.name: policy_of(site, Head("sparse", 1.0))})
    assert damage.kl < 1e-7
    assert abs(damage.perplexity_increase) < 1e-6


def test_damage_is_that_of_the_logits():
    measure, (site,), model, ids = judge()
    sparse = policy_of(site, Head("sparse", 0.5, neighbours=0))
    damage = measure({site.name: sparse})
    with torch.no_grad():
        dense = model(ids)[0]
        q = model.embed(ids).unflatten(-1, (2, 32)).transpose(1, 2)
        rule = {"mask": Mask(True), "scale": 32**-0.5, "block_m": 64, "block_n": 64}
        lists = select(q, q, to_tensor(sparse), selector="sub8", **rule)
        o, _ = reference.forward(q, q, q, *lists, to_tensor(sparse), **rule)
        wanted = compare(reading(dense, [ids], True), model.head(o.transpose(1, 2).flatten(2)))
    assert wanted.kl > 1e-5
    assert damage.kl == pytest.approx(wanted.kl, rel=1e-3)
    assert damage.perplexity_increase == pytest.approx(wanted.perplexity_increase, rel=1e-2)


@given(st.integers(0, 1 << 20), st.integers(1, 700), st.floats(0.0, 3.0))
def test_divergence_and_perplexity(seed, rows, noise):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(1, rows + 1, 7, generator=g)
    sparse = dense + noise * torch.randn(dense.shape, generator=g)
    ids = torch.randint(0, 7, (1, rows + 1), generator=g)
    found = compare(reading((dense,), [ids], perplexity=True), sparse)
    logs = [x.double().log_softmax(-1)[0] for x in (dense, sparse)]
    wanted = kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)
    losses = [cross_entropy(x[:-1], ids[0, 1:]) for x in logs]
    increase = float((losses[1] - losses[0]).exp() - 1)
    assert found.perplexity_increase == pytest.approx(increase, rel=1e-3, abs=1e-5)


def test_logits_that_are_not_finite_are_infinite_damage():
    dense = torch.zeros(1, 4, 3)
    sparse = torch.full_like(dense, math.nan)
    found = compare(reading(dense, [torch.zeros(1, 4, dtype=torch.int64)], True), sparse)
    assert found == Damage(math.inf, math.inf)
    assert divergence(dense[0], sparse[0]) == math.inf


def test_logits_are_the_widest_output():
    keys, logits = torch.zeros(1, 2, 9, 4), torch.zeros(1, 9, 32)
    assert logits_of((keys, {"logits": logits})) is logits
    with pytest.raises(Unmeasurable, match="max_error"):
        logits_of((torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), 3))


def test_tokens_that_do_not_fit_the_logits_are_named():
    logits = torch.zeros(1, 9, 5)
    with pytest.raises(Unmeasurable, match="max_kl"):
        next_tokens(logits, [torch.full((1, 9), 5), torch.zeros(1, 8, dtype=torch.int64)])
    assert next_tokens(logits, [torch.arange(9)[None] % 5])[-1] == -1


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.floats(0.0, 2.0), st.floats(-0.5, 2.0))
def test_share_says_whether_all_limits_hold(kl, increase, seen_kl, seen_increase):
    share = Limits(kl, increase).share(Damage(seen_kl, seen_increase))
    assert share >= 0.0
    assert (share <= 1.0) == (seen_kl <= kl and seen_increase <= increase)


@pytest.mark.parametrize("limit", [{"max_kl": 1e-3}, {"max_ppl_increase": 3e-3}])
def test_tuning_keeps_the_limit_on_the_input_that_is_held_out(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(calibrate, "measure", lambda *layer: Speed(1.0, 0.0, 0.5))
    torch.manual_seed(0)
    model = Model().eval()
    seen, unseen = (torch.randint(0, VOCABULARY, (1, 2048)) for _ in range(2))
    options = {"cache_dir": tmp_path} | limit
    (tuned,) = afbs_compile.tune(model, [seen, unseen], **options).tunings
    assert tuned.density < 1.0
    gm, args = traced(model, unseen)
    sites = plan(gm, args, 1).sites
    damage = Judge(gm, [args], sites, selector="sub8", perplexity=True)(tuned.sites)
    assert tuned.kl == pytest.approx(damage.kl, rel=1e-3)
    if "max_kl" in limit:
        assert 0.3 * limit["max_kl"] < damage.kl <= limit["max_kl"]  # used, and kept
    else:
        assert tuned.perplexity_increase == pytest.approx(damage.perplexity_increase, rel=1e-2)
        assert damage.perplexity_increase <= limit["max_ppl_increase"]


def test_a_limit_that_nothing_can_keep_leaves_all_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "measure", lambda *layer: Speed(1.0, 0.0, 0.5))
    torch.manual_seed(0)
    model, ids = Model().eval(), torch.randint(0, VOCABULARY, (1, 512))
    options = {"min_length": 512, "cache_dir": tmp_path, "max_kl": 1e-30}
    (tuned,) = afbs_compile.tune(model, [ids], **options).tunings
    assert {site.decision for site in tuned.sites.values()} == {"dense"}
    assert tuned.kl is None
