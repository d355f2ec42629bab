"""Are windowed heads what the policy says, are runs resumed right, and can a search be killed?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, scaled_dot_product_attention

import afbs_compile
from afbs_compile import hybrid_policy, rankings
from afbs_compile.hybrid_calls import Unsuitable, record
from afbs_compile.hybrid_losses import NothingToChoose
from afbs_compile.hybrid_objective import FIGURES, Evaluator
from afbs_compile.hybrid_samples import Sample
from afbs_compile.hybrid_subject import Wishes, subject
from afbs_compile.hybridizing import searched
from afbs_compile.policy import Policy
from afbs_compile.store import Store
from afbs_compile.tuner.heads import Impossible, text

VOCABULARY, LENGTH, WINDOW, SINK = 61, 150, 24, 3
MEMORY = 1 << 28
KL = FIGURES.index("kl")

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "uncompiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path"),
]


class Net(torch.nn.Module):
    """Layers of causal attention; `choice` [layers, kv] windows heads by an explicit mask."""

    def __init__(self, layers=3, heads=4, kv=2, write=False, causal=True):
        super().__init__()
        self.heads, self.kv, self.choice = heads, kv, None
        self.write, self.causal = write, causal
        width = 32 * heads
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.place = torch.nn.Embedding(2 * LENGTH, width)
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(width, 32 * (heads + 2 * kv)) for _ in range(layers)
        )
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for n, layer in enumerate(self.qkv):
            sizes = [32 * self.heads, 32 * self.kv, 32 * self.kv]
            parts = layer(x).split(sizes, -1)
            q, k, v = (p.unflatten(-1, (-1, 32)).transpose(1, 2) for p in parts)
            o = self.attend(3 * q, k, v, n).transpose(1, 2).flatten(2)
            if self.write:
                x += o
            else:
                x = x + o
        return self.head(x)

    def attend(self, q, k, v, n):
        if self.choice is None:
            return scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        near = (j > i - WINDOW) | (j < SINK)
        local = torch.tensor(self.choice[n]).repeat_interleave(self.heads // self.kv)
        seen = (j <= i) & (near | ~local[:, None, None])
        return scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def net(seed=0, **sizes):
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def tokens(seed, batch=2, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def evaluator(model, *inputs, memory=MEMORY):
    calls, _ = record(model, [Sample(x) for x in inputs], WINDOW)
    return Evaluator(calls, window=WINDOW, sink=SINK, memory_bytes=memory)


@torch.no_grad()
def explicit(model, ids, bits):
    """Logits of the model with masks of its own, and without."""
    dense = model(ids)
    model.choice = bits.reshape(len(model.qkv), model.kv).tolist()
    hybrid = model(ids)
    model.choice = None
    return dense, hybrid


@pytest.mark.parametrize("sizes", [{}, {"kv": 4}, {"kv": 1}, {"layers": 1}, {"write": True}])
def test_figures_are_those_of_explicit_masks(sizes):
    model, ids = net(**sizes), tokens(0)
    measure, rng = evaluator(model, ids), np.random.default_rng(0)
    for share in (0.0, 0.3, 0.6, 1.0):
        bits = rng.random(measure.layout.size) < share
        dense, hybrid = explicit(model, ids, bits)
        logs = [x.double().log_softmax(-1).flatten(0, 1) for x in (dense, hybrid)]
        wanted = kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
        (found,) = measure(bits)
        assert found[KL] == pytest.approx(float(wanted), rel=1e-3, abs=1e-7)
        targets = ids[:, 1:].flatten()
        own = hybrid.log_softmax(-1)[:, :-1].flatten(0, 1)
        assert found[1] == pytest.approx(-float(own.gather(1, targets[:, None]).mean()), rel=1e-4)
        right = (own.argmax(-1) == targets).double().mean()
        assert found[2] == pytest.approx(float(right), abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_resumed_run_is_the_whole_run(seed):
    rng = np.random.default_rng(seed)
    model, ids = net(layers=4), tokens(seed, batch=1)
    choices = [rng.random(8) < 0.5]
    for _ in range(8):
        following = choices[-1].copy()
        following[rng.integers(8)] ^= True
        choices.append(following)
    calls = evaluator(model, ids).calls
    resumed, tight, whole = (
        Evaluator(calls, window=WINDOW, sink=SINK, memory_bytes=m) for m in (MEMORY, 700_000, 0)
    )
    for bits in choices:
        found = resumed(bits)
        assert torch.equal(found, whole(bits))
        assert torch.equal(found, tight(bits))
    assert resumed.runs[0].ran < whole.runs[0].ran
    assert tight.runs[0].size_bytes <= 700_000


def test_what_a_graph_writes_to_is_never_resumed():
    model, ids = net(write=True), tokens(0)
    measure = evaluator(model, ids)
    bits = np.array([True, False, False, True, True, False])
    first = measure(bits)
    measure(~bits)
    assert torch.equal(measure(bits), first)
    assert measure.runs[0].ran == 4 * len(model.qkv)  # dense, and three times


def test_a_half_of_the_layers_costs_half_a_pass():
    measure = evaluator(net(layers=4), tokens(0))
    measure.prepare()
    before = measure.dense_passes()
    measure(np.arange(8) >= 4)
    assert measure.dense_passes() - before == 0.5


def search(model, ids, tmp_path, **wishes):
    wanted = {"ratio": 0.5, "window": WINDOW, "sink": SINK, "budget": 16, "prior": "none"}
    return afbs_compile.hybridize(model, ids, **(wanted | {"cache_dir": tmp_path} | wishes))


def chosen(policy):
    (tuning,) = policy.tunings
    return [[head.mode == "window" for head in site.heads] for site in tuning.sites.values()]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_policy_has_the_ratio_by_group(tmp_path, ratio):
    model = net(heads=4, kv=2, layers=4)
    policy = search(model, [tokens(0), tokens(1)], tmp_path, ratio=ratio)
    (tuning,) = policy.tunings
    modes = np.array(chosen(policy))
    assert modes.mean() == ratio
    assert np.array_equal(modes[:, 0::2], modes[:, 1::2])  # a group has one mind
    assert tuning.complete
    assert Policy.from_json(policy.to_json()) == policy
    heads = [head for site in tuning.sites.values() for head in site.heads]
    assert {(h.window, h.sink) for h in heads if h.mode == "window"} <= {(WINDOW, SINK)}
    assert [s.decision for s in tuning.sites.values()] == [
        "sparse" if any(row) else "dense" for row in chosen(policy)
    ]


def test_it_finds_the_best_of_a_small_model(tmp_path):
    model, ids = net(layers=2, kv=4), [tokens(0)]
    policy = search(model, ids, tmp_path, ratio=0.25, budget=40)
    measure = evaluator(model, *ids)
    every = [np.isin(np.arange(8), (a, b)) for a in range(8) for b in range(a)]
    best = min(float(measure(bits)[0, KL]) for bits in every)
    assert policy.tunings[0].kl == pytest.approx(best, rel=1e-6)


def test_killed_at_any_evaluation_it_goes_on(tmp_path, monkeypatch):
    model, plain, made = net(layers=2, kv=4), Evaluator.__call__, []
    wishes = Wishes(0.5, WINDOW, SINK, 12, prior="none", cache_dir=tmp_path)
    ready = subject(model, [Sample(tokens(0, batch=1, length=64))], wishes)

    def counted(self, bits):
        if len(made) == counted.last:
            raise ConnectionError
        made.append(bits)
        return plain(self, bits)

    def run(folder, last=-1):
        counted.last = last
        own = replace(ready, store=Store(ready.key, {"run": folder}, {}, tmp_path))
        with own.store:
            found, losses, _ = searched(own, wishes, lambda *_: None)
        return text(found.bits), found.loss, found.history, len(losses.known)

    monkeypatch.setattr(Evaluator, "__call__", counted)
    whole = run("whole")
    total = len(made)
    assert total == 13  # every head windowed is an anchor, not a choice
    for at in range(total):
        made.clear()
        with pytest.raises(ConnectionError):
            run(at, at)
        assert run(at) == whole
        assert len(made) == total
    made.clear()
    assert run("whole") == whole
    assert not made  # all known


def test_when_the_time_is_over_it_has_the_best_so_far(tmp_path):
    cut = search(net(), [tokens(0)], tmp_path, seconds=0.0)
    assert not cut.tunings[0].complete
    assert np.mean(chosen(cut)) == 0.5
    whole = search(net(), [tokens(0)], tmp_path)
    assert whole.tunings[0].complete
    assert whole.tunings[0].evaluations == 16


def test_ctrl_c_gives_the_best_so_far(tmp_path, monkeypatch):
    plain, made = Evaluator.__call__, []

    def interrupted(self, bits):
        made.append(bits)
        if len(made) == 9:
            raise KeyboardInterrupt
        return plain(self, bits)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    policy = search(net(), [tokens(0)], tmp_path)
    assert not policy.tunings[0].complete
    assert np.mean(chosen(policy)) == 0.5


@pytest.mark.parametrize(
    ("wishes", "kind", "message"),
    [
        ({"window": 0}, ValueError, "window is 0; needed: at least 1 key"),
        ({"window": -4}, ValueError, "window is -4"),
        ({"sink": -1}, ValueError, "sink is -1"),
        ({"ratio": 1.01}, ValueError, "ratio is 1.01; needed: a share"),
        ({"ratio": float("nan")}, ValueError, "ratio is nan"),
        ({"budget": 0}, Impossible, "budget is 0"),
        ({"objective": "luck"}, ValueError, "no objective 'luck'; there are kl, task"),
        ({"prior": "luck"}, ValueError, "no prior 'luck'"),
        ({"solver": "luck"}, Impossible, "no solver 'luck'"),
        ({"levels": (0, 2), "ratio": 0.5}, Impossible, "give the ratio"),
        ({"window": LENGTH}, Unsuitable, f"the longest input has {LENGTH} tokens"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, wishes, kind, message):
    with pytest.raises(kind, match=message):
        search(net(), [tokens(0)], tmp_path, **wishes)


def test_models_without_heads_to_window_are_refused(tmp_path):
    with pytest.raises(ValueError, match="inputs is empty"):
        search(net(), [], tmp_path)
    with pytest.raises(Unsuitable, match="not causal"):
        search(net(causal=False), [tokens(0)], tmp_path)
    with pytest.raises(Unsuitable, match="no attention call"):
        search(torch.nn.Linear(4, 4), [torch.zeros(2, 4)], tmp_path)


def test_heads_that_do_not_matter_are_no_objective(tmp_path):
    model = net()
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(NothingToChoose, match="changes nothing"):
        search(model, [tokens(0)], tmp_path)


@pytest.mark.parametrize("prior", rankings.RANKINGS)
def test_rankings_are_harms_by_group(tmp_path, prior):
    model, ids = net(), [tokens(0)]
    harm = prior_of(prior, model, ids, tmp_path)
    assert harm.shape == (6,)
    assert np.all(harm >= 0)
    assert np.isfinite(harm).all()
    assert np.mean(chosen(search(model, ids, tmp_path, prior=prior))) == 0.5


def prior_of(name, model, ids, folder):
    wishes = Wishes(0.5, WINDOW, SINK, cache_dir=folder)
    ready = subject(model, [Sample(x) for x in ids], wishes)
    with ready.store:
        return ready.prior(name, wishes)


def test_curvature_is_the_second_order_of_the_divergence(monkeypatch):
    monkeypatch.setattr(rankings, "DRAWS", 200)
    model, ids = net(), tokens(0, batch=1, length=64)
    (call,) = evaluator(model, ids).calls
    counted = torch.arange(ids.numel())
    generator = torch.Generator().manual_seed(0)
    found = rankings.slopes(call, counted, WINDOW, SINK, generator)
    form = found.T @ found / len(found)
    for groups in ((0,), (3,), (5,), (0, 1), (1, 4)):
        dense, near = (gated(call, groups, size) for size in (0.0, 0.05))
        kl = float(kl_div(near, dense, log_target=True, reduction="batchmean"))
        assert kl / 0.05**2 == pytest.approx(form[np.ix_(groups, groups)].sum(), rel=0.3)


def test_fisher_is_the_curvature_of_each_head_alone(tmp_path):
    form = np.array([[2.0, 1.0], [1.0, 6.0]])
    np.testing.assert_allclose(
        rankings.of_forms("fisher", np.stack([form, form]), 1), [0.25, 0.75]
    )


def gated(call, groups, size):
    """Log-probabilities with the gates of some groups open by `size`."""
    run = rankings.Gated(call, WINDOW, SINK)
    plain = torch.zeros

    def zeros(*shape, **how):
        made = plain(*shape, **how)
        if how.get("requires_grad"):
            n = len(run.gates)
            with torch.no_grad():
                for group in groups:
                    made[:, group % 2] += size if n == group // 2 else 0.0
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        return run.logits().detach().double().log_softmax(-1)


def test_locality_is_the_mass_outside():
    model, ids = net(layers=1), tokens(0, batch=1)
    found = rankings.ranking("locality", evaluator(model, ids), window=WINDOW, sink=SINK)
    with torch.no_grad():
        x = model.embed(ids) + model.place(torch.arange(LENGTH))
        q, k, _ = model.qkv[0](x).split([128, 64, 64], -1)
        q, k = (p.unflatten(-1, (-1, 32)).transpose(1, 2) for p in (3 * q, k))
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 32**-0.5
        weights = scores.masked_fill(j > i, -torch.inf).softmax(-1)
        far = (weights * ((j <= i - WINDOW) & (j >= SINK))).sum((0, 2, 3)) / LENGTH
    assert np.allclose(found, far.view(2, 2).sum(1).numpy(), rtol=1e-4)


def test_windows_and_thresholds_in_one_policy(tmp_path):
    model, ids = net(), [tokens(0)]
    hybrid = search(model, ids, tmp_path)
    (tuning,) = hybrid.tunings
    sites = {
        name: replace(
            site, decision="sparse", reason=None,
            heads=tuple(replace(h, mode="sparse", tau=0.8, window=0) for h in site.heads),
        )
        for name, site in tuning.sites.items()
    }  # fmt: skip
    options = {"selector": "sub4", "max_error": 0.1}
    tuned = replace(hybrid, tunings=(replace(tuning, options=options, sites=sites),))
    both = search(model, ids, tmp_path, thresholds=tuned)
    for name, site in both.tunings[0].sites.items():
        for head, mine in zip(site.heads, tuning.sites[name].heads, strict=True):
            assert (head == mine) if mine.mode == "window" else head.tau == 0.8
    assert both.tunings[0].options == {**tuning.options, "selector": "sub4"}
    assert tuning.holds_at_any_length
    assert not both.tunings[0].holds_at_any_length
    with pytest.raises(ValueError, match="of the models"):
        hybrid_policy.combined(hybrid, replace(tuned, model="other"))
    with pytest.raises(ValueError, match="no thresholds"):
        hybrid_policy.combined(hybrid, hybrid)
    with pytest.raises(ValueError, match="windows no heads"):
        hybrid_policy.combined(tuned, tuned)


def test_the_forecast_counts_rows(tmp_path):
    (tuning,) = search(net(layers=4, kv=1), [tokens(0)], tmp_path, ratio=0.75).tunings
    told = hybrid_policy.forecast(tuning, 1000)
    assert told["kv_bytes_dense"] == 4 * 1000 * 2 * 32 * 2
    assert told["decode_reads"] == pytest.approx(0.25 + 0.75 * (WINDOW + SINK) / 1000)
    assert told["kv_bytes"] == told["decode_reads"] * told["kv_bytes_dense"]
    assert 0.25 < told["prefill_blocks"] < 0.6


def test_workers_share_the_evaluations(tmp_path):
    wishes = Wishes(0.5, WINDOW, SINK, 20, prior="locality", cache_dir=tmp_path)
    ready = subject(net(layers=2, kv=4), [Sample(tokens(0, batch=1, length=64))], wishes)

    def work(folder):
        evaluator = Evaluator(ready.evaluator.calls, window=WINDOW, sink=SINK, memory_bytes=MEMORY)
        store = Store(ready.key, {"run": folder}, {}, tmp_path)
        own = replace(ready, evaluator=evaluator, store=store)
        with own.store:
            found, losses, _ = searched(own, wishes, lambda *_: None)
        return text(found.bits), found.loss, found.history, losses.measured

    *serial, alone = work("serial")
    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(work, ["shared"] * 3))
    assert all(list(found) == serial for *found, _ in shared)
    assert sum(measured for *_, measured in shared) == alone  # nothing twice


@pytest.mark.slow
def test_the_backend_runs_the_policy_at_any_length(tmp_path):
    model, path = net(), tmp_path / "hybrid.json"
    policy = search(model, [tokens(0)], tmp_path)
    path.write_text(policy.to_json())
    compiled = torch.compile(model, backend="afbs", options={"policy": path, "min_length": 1})
    bits = np.array(chosen(policy))[:, ::2].reshape(-1)
    for length in (LENGTH, 280):
        ids = tokens(1, length=length)
        dense, hybrid = explicit(model, ids, bits)
        with torch.no_grad():
            found = compiled(ids)
        assert torch.allclose(found, hybrid, atol=1e-4)
        assert not torch.allclose(found, dense, atol=1e-2)
