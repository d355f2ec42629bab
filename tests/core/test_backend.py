"""The backend end to end on a small model: tune, cache, rewrite, swap policies, survive."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import afbs_compile
from afbs_compile import backend, cache, calibrate, profiling
from afbs_compile.capture import Stream
from afbs_compile.evaluators import DirectEvaluator
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import Policy
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.timing import Speed
from afbs_compile.tuner.objective import FULL, u_of_tau

LENGTH = 768
OPTIONS = {"min_length": 128, "max_error": 0.3}
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_inductor", "sparse_is_faster", "clean")


class Attention(nn.Module):
    """Causal self-attention whose heads look at few tokens."""

    def __init__(self, heads=4, kv_heads=2, dim=32):
        super().__init__()
        self.shape = (heads, kv_heads, dim)
        width = heads * dim
        self.q, self.k, self.v = (nn.Linear(width, n * dim) for n in (heads, kv_heads, kv_heads))
        for proj in (self.q, self.k):
            proj.weight.data *= 4

    def forward(self, x):
        heads, kv_heads, dim = self.shape
        q = self.q(x).unflatten(-1, (heads, dim)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (kv_heads, dim)).transpose(1, 2) for p in (self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers of attention."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, length, 128, generator=generator)
    return 0.3 * noise + noise.cumsum(1) / length**0.5


@pytest.fixture
def clean():
    JOURNAL.clear()
    RUNNERS.clear()
    yield
    JOURNAL.clear()
    ALIVE.clear()


@pytest.fixture
def no_inductor(monkeypatch, request):
    """Graphs run as they are; counts how many were compiled."""
    compiled = []
    if "real_inductor" in request.keywords:
        return compiled
    monkeypatch.setattr(
        backend, "inductor", lambda gm, inputs, options: compiled.append(gm) or gm.forward
    )
    return compiled


@pytest.fixture
def sparse_is_faster(monkeypatch):
    """Small problems are not worth their selection; say that they are."""
    speed = Speed(dense=1.0, fixed=0.0, per_density=0.5)
    monkeypatch.setattr(calibrate, "measure", lambda *_: speed)


ALIVE = []  # a compiled model takes its graphs with it


def run(model, x, **options):
    ALIVE.append(torch.compile(model, backend="afbs", options=OPTIONS | options))
    with torch.no_grad():
        return ALIVE[-1](x)


def eager(model, x):
    with torch.no_grad():
        return model(x)


def relative(x, y):
    return ((x - y).abs().sum() / y.abs().sum()).item()


def stored():
    return Policy.read(afbs_compile.explain().calibration.policy_path)


def test_tunes_rewrites_and_remembers(no_inductor):
    model, x = Model(), tokens()
    first = run(model, x)
    report = afbs_compile.explain()
    assert (report.rewritten, report.calibration.cache) == (2, "miss")
    assert report.calibration.evaluations > 0
    assert [s.name for s in report.sites] == ["layers.0", "layers.1"]
    assert all(s.density < 0.95 for s in report.sites)
    assert 0 < relative(first, eager(model, x)) < 0.3
    targets = [n.target for n in no_inductor[0].graph.nodes]
    assert targets.count(torch.ops.afbs.attention.default) == 2
    torch._dynamo.reset()
    again = run(model, x)
    assert afbs_compile.explain().calibration.cache == "hit"
    assert afbs_compile.explain().calibration.evaluations == 0
    assert torch.equal(first, again)


@pytest.mark.parametrize("evaluator", ["profile", "direct"])
@pytest.mark.parametrize("strategy", ["afbs-bo", "bisect"])
@pytest.mark.parametrize("fidelity", ["query-blocks", "sequence-length"])
def test_every_head_keeps_its_promise(evaluator, strategy, fidelity):
    # a prefix of a quarter must be long enough to leave blocks out
    model, x = Model(), tokens(2048 if fidelity == "sequence-length" else LENGTH)
    run(model, x, evaluator=evaluator, strategy=strategy, fidelity=fidelity, max_error=0.2)
    (tuning,) = stored().tunings
    (runner,) = [r for r in RUNNERS if r.bounds or r.buckets]
    args = [p if isinstance(p, nn.Parameter) else x for p in inputs_of(runner, model, x)]
    stream = Stream(runner.gm, args, runner.sites)
    sparse_heads = 0
    for site in runner.sites:
        heads = tuning.sites[site.name].heads
        direct = DirectEvaluator(stream, site.name, site.heads, "sub8")
        found = direct(u_of_tau([min(h.tau, 0.9999) for h in heads]), FULL)
        for n, head in enumerate(heads):
            if head.mode == "sparse":
                sparse_heads += 1
                assert found.error[n] <= 0.2
                assert found.error[n] == pytest.approx(head.error, rel=1e-2, abs=1e-5)
                assert found.density[n] == pytest.approx(head.density, rel=1e-5)
    assert sparse_heads > 0


def inputs_of(runner, model, x):
    """The graph's inputs in order: weights by path, everything else is x."""
    weights = dict(model.named_parameters())
    count = len([n for n in runner.gm.graph.nodes if n.op == "placeholder"])
    return [weights[runner.names[n]] if n in runner.names else x for n in range(count)]


def test_compensation_is_tuned_and_run():
    """It keeps the promise with fewer blocks, and has a tuning of its own."""
    model, x = Model(), tokens()
    densities = {}
    for name in ("none", "tangent"):
        out = run(model, x, compensation=name, max_error=0.2)
        assert afbs_compile.explain().calibration.cache == "miss"
        assert 0 < relative(out, eager(model, x)) < 0.3
        (runner,) = [r for r in RUNNERS if r.bounds or r.buckets]
        (tuning,) = [t for t in stored().tunings if t.options["compensation"] == name]
        args = [p if isinstance(p, nn.Parameter) else x for p in inputs_of(runner, model, x)]
        stream = Stream(runner.gm, args, runner.sites)
        sparse = []
        for site in runner.sites:
            heads = tuning.sites[site.name].heads
            direct = DirectEvaluator(stream, site.name, site.heads, "sub8", compensation=name)
            found = direct(u_of_tau([min(h.tau, 0.9999) for h in heads]), FULL)
            sparse += [(e, h) for e, h in zip(found.error, heads, strict=True)
                       if h.mode == "sparse"]  # fmt: skip
        assert all(e == pytest.approx(h.error, rel=1e-2, abs=1e-5) for e, h in sparse)
        assert max(e for e, _ in sparse) <= 0.2
        densities[name] = [h.density for s in tuning.sites.values() for h in s.heads]
        RUNNERS.clear()
        torch._dynamo.reset()
    assert sum(densities["tangent"]) < sum(densities["none"])


def test_training_with_compensation_is_left_dense():
    model, x = Model(), tokens()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS | {"compensation": "tangent"})
    ALIVE.append(compiled)
    torch.testing.assert_close(compiled(x), model(x))
    reason = "needs gradients: no backward with compensation 'tangent'"
    assert [r for r in afbs_compile.explain().reasons if r.startswith(reason)]


def test_max_error_zero_is_dense():
    model, x = Model(), tokens()
    assert torch.equal(run(model, x, max_error=0), eager(model, x))
    assert set(afbs_compile.explain().reasons) == {"max_error is 0"}


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("AFBS_DISABLE", "1")
    model, x = Model(), tokens()
    assert torch.equal(run(model, x), eager(model, x))
    assert set(afbs_compile.explain().reasons) == {"AFBS_DISABLE is set"}


def everything_kept(policy):
    """The policy with tau = 1, and in training a budget of 1, in every head."""
    tunings = []
    for tuning in policy.tunings:
        sites = {
            name: replace(
                site,
                heads=tuple(replace(h, mode="sparse", tau=1.0, density=1.0) for h in site.heads),
            )
            for name, site in tuning.sites.items()
        }
        tunings.append(replace(tuning, sites=sites))
    return replace(policy, tunings=tuple(tunings))


def test_a_new_policy_needs_no_compilation(no_inductor):
    model, x = Model(), tokens()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    with torch.no_grad():
        tuned = compiled(x)
        policy = stored()
        assert afbs_compile.use_policy(everything_kept(policy)) == 1
        dense = compiled(x)
        assert afbs_compile.use_policy(policy) == 1
        assert torch.equal(compiled(x), tuned)
    assert len(no_inductor) == 1
    torch.testing.assert_close(dense, eager(model, x), atol=1e-5, rtol=1e-5)
    assert relative(tuned, dense) > 1e-4


def test_a_policy_file_is_used_as_it_is(tmp_path):
    model, x = Model(), tokens()
    run(model, x)
    file = tmp_path / "mine.json"
    file.write_text(everything_kept(stored()).to_json())
    torch._dynamo.reset()
    out = run(model, x, policy=str(file))
    assert afbs_compile.explain().calibration.cache == "file"
    torch.testing.assert_close(out, eager(model, x), atol=1e-5, rtol=1e-5)


def test_three_lengths_compile_twice(no_inductor):
    model = Model()
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    with torch.no_grad():
        for length in (256, 400, 512, 300, 96):
            out = compiled(tokens(length))
            assert relative(out, eager(model, tokens(length))) < 0.3
            assert out.shape == (1, length, 128)
        torch.testing.assert_close(out, eager(model, tokens(96)))
    assert len(no_inductor) <= 2
    buckets = [t.bucket for t in stored().tunings]
    assert buckets == [256, 320, 448, 512]


def test_models_of_one_class_have_their_own_policies():
    x = tokens()
    one, other = Model(0), Model(1)
    compiled = [torch.compile(m, backend="afbs", options=OPTIONS) for m in (one, other)]
    with torch.no_grad():
        outs = [c(x) for c in compiled]
    assert len({c.model for c in afbs_compile.explain().calibrations}) == 2
    torch._dynamo.reset()
    for model, out in zip((one, other), outs, strict=True):
        torch._dynamo.reset()
        assert torch.equal(run(model, x), out)


def test_sites_that_gain_nothing_stay_dense(monkeypatch):
    slow = Speed(dense=1.0, fixed=0.9, per_density=0.5)
    monkeypatch.setattr(calibrate, "measure", lambda *_: slow)
    model, x = Model(), tokens()
    assert torch.equal(run(model, x), eager(model, x))
    assert all("not faster" in reason for reason in afbs_compile.explain().reasons)


class Cached(nn.Module):
    """Writes to a buffer of its own, as a static key-value cache does."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.register_buffer("seen", torch.zeros(1, LENGTH, 128))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen.copy_(x)
        self.calls.add_(1)
        return self.attention(self.seen + torch.rand(()) * 0)


def test_calibration_leaves_no_trace():
    model, x = Cached(), tokens()
    torch.manual_seed(5)
    run(model, x)
    after = torch.rand(3)
    assert afbs_compile.explain().calibration.cache == "miss"
    assert model.calls.item() == 1
    torch.manual_seed(5)
    eager(model, x)
    assert torch.equal(torch.rand(3), after)


def test_interrupt_keeps_what_was_found_and_the_next_run_goes_on(monkeypatch):
    model, x = Model(), tokens()
    sink = calibrate.Sink
    monkeypatch.setattr(calibrate, "Sink", type("Stopping", (sink,), {"__setitem__": stopping}))
    with pytest.raises(KeyboardInterrupt):
        run(model, x)
    torch._dynamo.reset()
    (entry,) = cache.entries()
    (tuning,) = entry.policy.tunings
    reasons = {name: site.reason for name, site in tuning.sites.items()}
    assert reasons == {"layers.0": None, "layers.1": "tuning was interrupted"}
    assert not tuning.complete
    monkeypatch.setattr(calibrate, "Sink", sink)
    monkeypatch.setattr(profiling, "profiled", None)  # everything was measured
    run(model, x)
    (tuning,) = stored().tunings
    assert (sorted(tuning.sites), tuning.complete) == (["layers.0", "layers.1"], True)


def stopping(self, name, result):
    calibrate_sink = type(self).__mro__[1]
    calibrate_sink.__setitem__(self, name, result)
    raise KeyboardInterrupt


BROKEN = [
    ("truncated", lambda text: text[: len(text) // 2], "cannot be used"),
    (
        "foreign",
        lambda text: re.sub(r'"(model|weights)": "\w{32}"', rf'"\1": "{"f" * 32}"', text),
        "another model",
    ),
]


@pytest.mark.parametrize(("name", "damage", "reason"), BROKEN)
def test_unusable_policy_files_leave_the_model_running(tmp_path, name, damage, reason):
    model, x = Model(), tokens()
    run(model, x)
    file = tmp_path / f"{name}.json"
    file.write_text(damage(stored().to_json()))
    torch._dynamo.reset()
    JOURNAL.clear()
    with pytest.warns(AfbsWarning, match="runs dense"):
        out = run(model, x, policy=str(file))
    torch.testing.assert_close(out, eager(model, x))
    assert all(reason in why for why in afbs_compile.explain().reasons)


def test_missing_policy_file(tmp_path):
    with pytest.warns(AfbsWarning, match="cannot be read"):
        run(Model(), tokens(), policy=str(tmp_path / "nowhere.json"))


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    model, x = Model(), tokens()
    with pytest.warns(AfbsWarning, match="AFBS_CACHE_DIR"):
        out = run(model, x, cache_dir=str(blocked))
    assert relative(out, eager(model, x)) < 0.3
    assert afbs_compile.explain().rewritten == 2


def test_the_search_keeps_blas_to_one_thread(monkeypatch):
    """Its matrices are tiny; what the program has set comes back."""
    search, seen = calibrate.tune, []

    def blas():
        return [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]

    def watched(*args, **given):
        seen.append(blas())
        return search(*args, **given)

    monkeypatch.setattr(calibrate, "tune", watched)
    with threadpool_limits(2, user_api="blas"):
        run(Model(), tokens())
        assert set(blas()) == {2}
    assert [set(found) for found in seen] == [{1}]


def test_inputs_that_cannot_be_measured_leave_the_model_running():
    model, x = Model(), tokens()
    x[0, 5] = torch.nan
    with pytest.warns(AfbsWarning, match="calibration failed"):
        out = run(model, x)
    torch.testing.assert_close(out, eager(model, x), equal_nan=True)


def test_unknown_options_name_the_next_step():
    with pytest.raises(Exception, match="did you mean 'max_error'"):
        run(Model(), tokens(), max_errors=0.1)


def weight_gradients(model, run, x):
    """All of them in one vector: the gradient of a key's bias is 0."""
    model.zero_grad()
    run(x).square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_is_sparse(device):
    """Tuned and rewritten on the first step; with every block kept, the gradients are SDPA's."""
    length = 1024 if device == "cpu" else 2048
    model, x = Model().to(device), tokens(length).to(device)
    want = weight_gradients(model, model, x)
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    ALIVE.append(compiled)
    sparse = weight_gradients(model, compiled, x)
    assert afbs_compile.explain().rewritten == 2
    assert 1e-3 < relative(sparse, want) < 0.5
    assert afbs_compile.use_policy(everything_kept(stored())) == 1
    assert relative(weight_gradients(model, compiled, x), want) < 1e-4


def test_a_graph_without_attention_is_inductors(no_inductor):
    run(nn.Linear(128, 8), tokens())
    assert len(no_inductor) == 1
    assert afbs_compile.explain().sites == []


def test_tune_ahead_of_time_holds_the_last_input_out():
    model = Model()
    policy = afbs_compile.tune(model, [tokens(seed=n) for n in range(3)], **OPTIONS)
    (tuning,) = policy.tunings
    assert [i.endswith("held out") for i in tuning.inputs] == [False, False, True]
    assert tuning.max_error <= 0.3
    run(model, tokens())
    assert afbs_compile.explain().calibration.cache == "hit"


def test_tune_without_attention_says_so():
    with pytest.raises(ValueError, match="no attention call"):
        afbs_compile.tune(nn.Linear(128, 8), [tokens()], **OPTIONS)


@pytest.mark.real_inductor
def test_inductor_compiles_the_rewritten_graph():
    model, x = Model(), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(model, backend="afbs", fullgraph=True, options=OPTIONS)
        with torch.no_grad():
            out = compiled(x)
            afbs_compile.use_policy(everything_kept(stored()))
            dense = compiled(x)
    assert 0 < relative(out, eager(model, x)) < 0.3
    torch.testing.assert_close(dense, eager(model, x), atol=1e-5, rtol=1e-5)


def test_fake_inputs_are_left_dense():
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = []
    torch.compile(Model(), backend=lambda gm, x: graphs.append((gm, x)) or gm.forward)(tokens())
    ((gm, inputs),) = graphs
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        backend.afbs(gm, [mode.from_tensor(x) for x in inputs], options=OPTIONS)
    assert all("no real inputs" in why for why in afbs_compile.explain().reasons)
