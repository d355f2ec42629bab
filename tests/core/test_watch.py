"""A program that goes on measuring while it serves: so many calls, then the fast path."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import afbs_compile
from afbs_compile import backend, calibrate, looks, runner
from afbs_compile.policy import Policy
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS, Runner
from afbs_compile.timing import Speed
from afbs_compile.watch import Watch

LENGTH = 512
OPTIONS = {"min_length": 128, "max_error": 0.2}


class Model(torch.nn.Module):
    """One causal attention."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = torch.nn.Linear(64, 192)
        self.project.weight.data[:128] *= 4

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (2, 32)).transpose(1, 2) for p in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def tokens(seed, length=LENGTH):
    noise = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(seed))
    return (0.3 + seed % 2) * noise + noise.cumsum(1) / length**0.5


@pytest.fixture
def slow_calls(fresh_dynamo, monkeypatch):
    """Calls that did not take the fast path; graphs run as they are, sparse counts as faster."""
    JOURNAL.clear()
    RUNNERS.clear()
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    monkeypatch.setattr(runner, "later", lambda gm, dynamic, options: gm.forward)
    speed = Speed(dense=1.0, fixed=0.0, per_density=0.5)
    for module in (calibrate, looks):
        monkeypatch.setattr(module, "measure", lambda *_: speed)
    seen, prepare = [], Runner.prepare

    def counted(self, args):
        seen.append(args)
        return prepare(self, args)

    monkeypatch.setattr(Runner, "prepare", counted)
    yield seen
    JOURNAL.clear()


def stored():
    return Policy.read(afbs_compile.explain().calibration.policy_path)


def serve(compiled, seeds, length=LENGTH):
    with torch.no_grad():
        for seed in seeds:
            compiled(tokens(seed, length))


def taus(tuning):
    return [1.0 if h.mode == "dense" else h.tau for s in tuning.sites.values() for h in s.heads]


def test_so_many_calls_are_measured_and_then_none(slow_calls):
    compiled = torch.compile(Model(), backend="afbs", options=OPTIONS | {"calibration_calls": 3})
    serve(compiled, [0])
    (first,) = stored().tunings
    serve(compiled, [1, 2])
    (third,) = stored().tunings
    assert (len(first.inputs), len(third.inputs)) == (1, 3)
    assert all(now >= before for before, now in zip(taus(first), taus(third), strict=True))
    assert taus(third) != taus(first)  # the second call is rougher
    count = len(slow_calls)
    serve(compiled, [3, 4, 5])
    assert len(slow_calls) <= count + 1  # the next call is remembered, the others take it
    assert len(stored().tunings[0].inputs) == 3


def test_one_call_is_all_by_default(slow_calls):
    compiled = torch.compile(Model(), backend="afbs", options=OPTIONS)
    serve(compiled, [0, 1, 2])
    assert len(stored().tunings[0].inputs) == 1
    assert len(slow_calls) == 1


def test_what_runs_is_what_is_stored(slow_calls):
    model = Model()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS | {"calibration_calls": 2})
    serve(compiled, [0, 1])
    torch._dynamo.reset()
    again = torch.compile(model, backend="afbs", options=OPTIONS | {"calibration_calls": 2})
    with torch.no_grad():
        assert torch.equal(compiled(tokens(5)), again(tokens(5)))


def test_a_later_process_goes_on(slow_calls):
    model = Model()
    wish = OPTIONS | {"calibration_calls": 3}
    serve(torch.compile(model, backend="afbs", options=wish), [0, 1])
    torch._dynamo.reset()
    serve(torch.compile(model, backend="afbs", options=wish), [2, 3, 4])
    assert len(stored().tunings[0].inputs) == 3


def test_a_given_policy_is_used_as_it_is(slow_calls, tmp_path):
    model, file = Model(), tmp_path / "mine.json"
    serve(torch.compile(model, backend="afbs", options=OPTIONS), [0])
    file.write_text(stored().to_json())
    torch._dynamo.reset()
    wish = OPTIONS | {"calibration_calls": 3, "policy": str(file)}
    before = file.read_text()
    compiled = torch.compile(model, backend="afbs", options=wish)
    count = len(slow_calls)
    serve(compiled, [1, 2, 3])
    assert len(slow_calls) == count + 1
    assert file.read_text() == before


def test_a_policy_put_in_ends_the_watch(slow_calls):
    compiled = torch.compile(Model(), backend="afbs", options=OPTIONS | {"calibration_calls": 9})
    serve(compiled, [0])
    path, mine = afbs_compile.explain().calibration.policy_path, stored()
    assert afbs_compile.use_policy(mine) == 1
    serve(compiled, [1, 2])
    assert Policy.read(path) == mine


def test_buckets_are_watched_each(slow_calls):
    wish = OPTIONS | {"calibration_calls": 2}
    compiled = torch.compile(Model(), backend="afbs", options=wish, dynamic=True)
    serve(compiled, [0, 1, 2])
    serve(compiled, [0, 1, 2], 2 * LENGTH)
    assert [len(t.inputs) for t in stored().tunings] == [2, 2]


def test_symbolic_sizes_are_no_call(slow_calls, monkeypatch):
    compiled = torch.compile(Model(), backend="afbs", options=OPTIONS, dynamic=True)
    serve(compiled, [0])
    (running,) = RUNNERS
    mode = FakeTensorMode(shape_env=ShapeEnv())
    asked = [
        mode.shape_env.create_unbacked_symint() if isinstance(x, int) else mode.from_tensor(x)
        for x in slow_calls[0]
    ]
    assert any(isinstance(x, torch.SymInt) for x in asked)
    plain = runner.Bound(lambda *args: "strides", [], torch.empty(0), None)
    monkeypatch.setattr(Runner, "bound", lambda *_: plain)
    assert running(*asked) == "strides"


def test_nothing_sparse_is_nothing_to_watch(tuning):
    watch = Watch(5)
    dense = tuning(sites={})
    watch.note(((1,), 512), dense)
    watch.note(((1,), 1024), None)
    assert not watch.open
    watch.note(((1,), 512), tuning())
    assert watch.due(((1,), 512)) == tuning()
    watch.forget((1,))
    assert not watch.open
