"""A new length: thresholds of a close one are measured on it, and hold, back off or go."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import afbs_compile
from afbs_compile import backend, calibrate, looks, source
from afbs_compile.capture import Layer
from afbs_compile.evaluators import profiled
from afbs_compile.kernels.geometry import Mask
from afbs_compile.policy import Policy, bucket_of
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.timing import Speed
from afbs_compile.tuner.objective import FULL, u_of_tau

CAP = 0.3
OPTIONS = {"min_length": 128, "max_error": CAP}
HEADS = 4
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "interpreted")


class Model(torch.nn.Module):
    """One causal attention whose heads look at few tokens."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = torch.nn.Linear(128, 3 * 128)
        self.project.weight.data[:256] *= 4

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (HEADS, 32)).transpose(1, 2)
            for part in self.project(x).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def tokens(length, seed=0):
    noise = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(seed))
    return 0.3 * noise + noise.cumsum(1) / length**0.5


@pytest.fixture
def interpreted(monkeypatch):
    """Graphs run as they are, and sparse calls count as the faster ones."""
    JOURNAL.clear()
    RUNNERS.clear()
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    speed = Speed(dense=1.0, fixed=0.0, per_density=0.5)
    for module in (calibrate, looks):
        monkeypatch.setattr(module, "measure", lambda *_: speed)
    yield
    JOURNAL.clear()


@pytest.fixture
def searches(monkeypatch):
    """The lengths at which a search ran."""
    ran = []
    whole = calibrate.calibrate

    def counted(problem, *rest):
        ran.append(problem.length)
        return whole(problem, *rest)

    monkeypatch.setattr(source, "calibrate", counted)
    return ran


def run(compiled, length):
    with torch.no_grad():
        return compiled(tokens(length))


def stored():
    return Policy.read(afbs_compile.explain().calibration.policy_path)


def put(policy):
    Path(afbs_compile.explain().calibration.policy_path).write_text(policy.to_json())


def at(length):
    (tuning,) = [t for t in stored().tunings if t.bucket == bucket_of(length)]
    return tuning


def only_site(tuning):
    (site,) = tuning.sites.values()
    return site


def errors(model, tuning, length):
    """The largest error that a tuning's heads have at a length, every query block measured."""
    q, k, v = (
        part.unflatten(-1, (HEADS, 32)).transpose(1, 2)
        for part in model.project(tokens(length)).chunk(3, -1)
    )
    layer = Layer(q, k, v, Mask(causal=True), 32**-0.5)
    heads = only_site(tuning).heads
    dense = torch.tensor([head.mode == "dense" for head in heads]).numpy()
    evaluate = profiled(layer, selector="sub8", heads=HEADS)
    error = evaluate(u_of_tau([min(head.tau, 1.0) for head in heads]), FULL).error
    return error * ~dense


def test_a_close_length_is_measured_and_not_searched(searches):
    model = Model()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    run(compiled, 1024)
    run(compiled, 1200)
    assert searches == [1024]
    first, second = at(1024), at(1200)
    assert "validated" in second.inputs[0]
    assert second.complete
    assert 0 < second.evaluations < first.evaluations
    pairs = zip(only_site(first).heads, only_site(second).heads, strict=True)
    assert all(new.tau >= old.tau or new.mode == "dense" for old, new in pairs)
    with torch.no_grad():
        assert errors(model, second, 1200).max() <= CAP
    # and a process that starts later finds it
    torch._dynamo.reset()
    run(torch.compile(model, backend="afbs", options=OPTIONS), 1200)
    assert afbs_compile.explain().calibration.cache == "hit"
    assert searches == [1024]


@pytest.mark.parametrize("other", [400, 2560])
def test_a_far_length_is_searched(searches, other):
    compiled = torch.compile(Model(), backend="afbs", options=OPTIONS)
    run(compiled, 1024)
    run(compiled, other)
    assert searches == [1024, other]


def test_other_options_are_no_neighbour(searches):
    model = Model()
    run(torch.compile(model, backend="afbs", options=OPTIONS), 1024)
    run(torch.compile(model, backend="afbs", options=OPTIONS | {"max_error": 0.1}), 1200)
    assert searches == [1024, 1200]


def loosened(policy, tau):
    """The policy with every head at `tau`."""
    (tuning,) = policy.tunings
    site = only_site(tuning)
    heads = tuple(replace(head, mode="sparse", tau=tau) for head in site.heads)
    loose = replace(tuning, sites={site.name: replace(site, heads=heads)})
    return replace(policy, tunings=(loose,))


def test_thresholds_that_do_not_hold_are_searched_for_again(searches):
    model = Model()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    run(compiled, 1024)
    put(loosened(stored(), 0.02))
    run(compiled, 1200)
    assert searches == [1024, 1200]
    with torch.no_grad():
        assert errors(model, at(1200), 1200).max() <= CAP


def test_heads_above_the_cap_back_off(searches):
    model, cap = Model(), 0.1
    options = OPTIONS | {"max_error": cap, "mean_error": cap}  # each head's cap alone binds
    compiled = torch.compile(model, backend="afbs", options=options)
    run(compiled, 1024)
    put(loose := loosened(stored(), 0.3))
    with torch.no_grad():
        assert errors(model, loose.tunings[0], 1200).max() > cap
    run(compiled, 1200)
    assert searches == [1024]
    with torch.no_grad():
        assert errors(model, at(1200), 1200).max() <= cap


@pytest.mark.parametrize("limited", [False, True])
def test_an_end_to_end_limit_is_never_assumed(monkeypatch, limited):
    monkeypatch.setattr(source, "carry", lambda *_: "carried")
    problem = SimpleNamespace(sites=[], options=SimpleNamespace(limited=limited))
    assert source.carried(problem, None, None) == (None if limited else "carried")


def test_a_policy_file_serves_shorter_lengths(tmp_path, searches):
    model = Model()
    run(torch.compile(model, backend="afbs", options=OPTIONS), 1024)
    file = tmp_path / "mine.json"
    file.write_text(stored().to_json())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS | {"policy": str(file)})
    sparse = run(compiled, 640)
    assert afbs_compile.explain().calibration.cache == "file"
    assert not torch.equal(sparse, model(tokens(640)))
    assert searches == [1024]
