"""One more call: thresholds hold on it, or become more careful, never less."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from afbs_compile import cache, calibrate, looks, recheck, source
from afbs_compile.ahead import Recorder, problems
from afbs_compile.capture import Stream
from afbs_compile.evaluators import profiled
from afbs_compile.logs import AfbsWarning
from afbs_compile.options import parse
from afbs_compile.timing import Speed
from afbs_compile.tuner.objective import FULL, u_of_tau

CAP = 0.2
LENGTH = 768  # 12 query blocks, so a look sees all of them
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")


class Model(torch.nn.Module):
    """Two causal attentions whose heads look at few tokens."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 192) for _ in range(2)])
        for layer in self.layers:
            layer.weight.data[:128] *= 4

    def forward(self, x):
        for layer in self.layers:
            q, k, v = (p.unflatten(-1, (2, 32)).transpose(1, 2) for p in layer(x).chunk(3, -1))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + o.transpose(1, 2).flatten(2)
        return x


@pytest.fixture
def sparse_is_faster(monkeypatch):
    speed = Speed(dense=1.0, fixed=0.0, per_density=0.5)
    for module in (calibrate, looks):
        monkeypatch.setattr(module, "measure", lambda *_: speed)


def tokens(seed, rough=0.3):
    noise = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(seed))
    return rough * noise + noise.cumsum(1) / LENGTH**0.5


@pytest.fixture
def tuned():
    """A problem, its key, and its tuning from one call."""
    recorder = Recorder(parse({"min_length": 128, "max_error": CAP}))
    with torch.no_grad():
        torch.compile(Model(), backend=recorder)(tokens(0))
    ((problem, key),) = problems(recorder)
    return problem, key, source.measure_now(problem, key, None)


def other_call(problem, seed, rough=0.3):
    """The same model on another input."""
    wanted = tokens(seed, rough)
    args = [wanted if x.shape == wanted.shape else x for x in problem.inputs[0]]
    return replace(problem, inputs=[args])


def errors(problem, tuning):
    """The error of every head on the problem's input, all query blocks measured."""
    stream = Stream(problem.gm, problem.inputs[0], problem.sites)
    found = []
    for site in problem.sites:
        heads = tuning.sites[site.name].heads
        u = u_of_tau(np.array([min(head.tau, 1.0) for head in heads]))
        with torch.no_grad():
            evaluate = profiled(stream.layer(site.name), selector="sub8", heads=site.heads)
        dense = np.array([head.mode == "dense" for head in heads])
        found.append(np.where(dense, 0.0, evaluate(u, FULL).error))
    return np.concatenate(found)


def taus(tuning):
    return np.array([h.tau if h.mode != "dense" else 1.0
                     for s in tuning.sites.values() for h in s.heads])  # fmt: skip


def with_tau(tuning, tau):
    sites = {
        name: replace(site, heads=tuple(replace(h, mode="sparse", tau=tau) for h in site.heads))
        for name, site in tuning.sites.items()
    }
    return replace(tuning, sites=sites)


def nothing(*_):
    pass


@pytest.mark.parametrize("rough", [0.3, 2.0])
def test_what_is_promised_holds_on_the_new_call_too(tuned, rough):
    problem, _, known = tuned
    call = other_call(problem, 1, rough)
    after = recheck.recheck(call, known, nothing)
    found = errors(call, after)
    assert found.max() <= CAP
    assert found.mean() <= 0.3 * CAP + 1e-9
    assert (taus(after) >= taus(known) - 1e-9).all()
    assert errors(problem, after).max() <= CAP
    assert len(after.inputs) == len(known.inputs) + 1
    assert after.evaluations > known.evaluations


def test_a_call_that_was_seen_changes_no_threshold(tuned):
    problem, _, known = tuned
    after = recheck.recheck(problem, known, nothing)
    assert (taus(after) == taus(known)).all()


def test_loose_thresholds_become_careful(tuned):
    problem, _, known = tuned
    loose = with_tau(known, 0.05)
    assert errors(problem, loose).mean() > 0.3 * CAP
    after = recheck.recheck(problem, loose, nothing)
    assert errors(problem, after).mean() <= 0.3 * CAP
    assert errors(problem, after).max() <= CAP


def test_a_limit_that_never_holds_ends_dense(tuned, monkeypatch):
    problem, _, known = tuned
    hopeless = SimpleNamespace(share=lambda results: 2.0)
    monkeypatch.setattr(recheck.Bound, "of", classmethod(lambda *_: hopeless))
    limited = replace(problem, options=parse({"min_length": 128, "max_kl": 0.01}))
    after = recheck.recheck(limited, known, nothing)
    assert all(site.decision == "dense" for site in after.sites.values())


def test_heads_with_the_largest_errors_go_first(tuned, monkeypatch):
    problem, _, known = tuned
    # no threshold helps, but a single dense head does
    monkeypatch.setattr(recheck, "ROUNDS", 0)
    loose = with_tau(known, 0.05)
    before = errors(problem, loose)
    monkeypatch.setattr(recheck, "settled", lambda look, u, dense, *_: plain(look, u, dense))
    budget = (before.sum() - before.max() * 0.99) / len(before)
    strict = replace(problem, options=parse({
        "min_length": 128, "max_error": 1.0, "mean_error": float(budget),
    }))  # fmt: skip
    after = recheck.recheck(strict, loose, nothing)
    dense = [h.mode == "dense" for s in after.sites.values() for h in s.heads]
    assert sum(dense) == 1
    assert dense[int(before.argmax())]


def plain(look, u, dense):
    """What a look says, nothing backed off."""
    measured = look.evaluator(u, FULL)
    off = np.zeros(len(u), dtype=np.int64)
    return looks.SiteResult(u, dense, measured.error, measured.density, off, -np.inf + off)


def test_it_is_stored(tuned):
    problem, key, known = tuned
    after = source.check_again(other_call(problem, 1, 2.0), key, known)
    (stored,) = cache.load(key, problem.options.cache_folder).tunings
    assert stored == after
    assert stored.inputs[-1] == f"{LENGTH} tokens, checked on {looks.ROWS} query blocks"


def test_what_cannot_be_measured_changes_nothing(tuned):
    problem, key, known = tuned
    call = other_call(problem, 1)
    bad = replace(call, inputs=[[x * torch.nan if x.shape[1:] == (LENGTH, 64) else x
                                 for x in call.inputs[0]]])  # fmt: skip
    with pytest.warns(AfbsWarning, match="could not be measured"):
        assert source.check_again(bad, key, known) is known
