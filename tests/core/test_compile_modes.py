"""However `torch.compile` is asked, and from however many threads: right, and no more graphs."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile import backend
from afbs_compile.bench import forced, zoo
from afbs_compile.bench.forced import distance
from afbs_compile.bench.zoo import ByHand
from afbs_compile.policy import Head

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LENGTHS = (200, 130, 300)
EXACT = 1e-5


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return zoo.drawn(nn.Sequential(ByHand(), ByHand()))


def x(length=200, seed=0):
    return torch.randn(1, length, zoo.WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def force():
    with forced.interpreted(), forced.forced(forced.every(1.0)) as force:
        yield force


def ours(one, force, **settings):
    options = {"min_length": 1, "cache_dir": force.cache_dir}
    return torch.compile(one, backend="afbs", options=options, **settings)


def run(call, lengths=LENGTHS, mark=False):
    """Outputs at some lengths, without gradients."""
    inputs = [x(length) for length in lengths]
    if mark:
        for one in inputs:
            torch._dynamo.mark_dynamic(one, 1)
    with torch.no_grad():
        return [call(one) for one in inputs]


@pytest.mark.parametrize("settings", [{"fullgraph": True}, {"dynamic": True}, {"dynamic": False}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("mark", [False, True])
def test_graphs_and_outputs(force, settings, mark):
    if mark and settings.get("dynamic") is False:
        pytest.skip("contradicts itself")
    one, graphs = model(), []
    want = run(one)
    run(torch.compile(one, backend=forced.counting(graphs), **settings), mark=mark)
    torch._dynamo.reset()
    found = run(ours(one, force, **settings), mark=mark)
    assert max(map(distance, found, want)) < EXACT
    assert force.graphs == len(graphs)
    assert afbs_compile.explain().rewritten >= 2
    assert not afbs_compile.explain().reasons


def test_inductors_options_and_mode_are_forwarded(monkeypatch):
    given = []
    monkeypatch.setattr(
        backend, "compile_fx", lambda gm, x, config_patches: given.append(config_patches) or gm
    )
    with forced.interpreted(), forced.forced(forced.every(1.0), "inductor") as force:
        options = {"min_length": 1, "cache_dir": force.cache_dir, "triton.cudagraphs": True}
        run(torch.compile(model(), backend="afbs", options=options), [200])
        torch._dynamo.reset()
        run(torch.compile(nn.Linear(zoo.WIDTH, 2), backend="afbs", mode="max-autotune"), [200])
    assert given[0] == {"triton.cudagraphs": True}
    assert given[1]["max_autotune"]


def test_an_exported_model_is_dense_and_can_be_compiled_with_us(force):
    one = model()
    with torch.no_grad():
        exported = torch.export.export(ours(one, force), (x(),)).module()
        assert distance(exported(x()), one(x())) < EXACT
        assert force.graphs == 0
        found = ours(exported, force)(x())
    assert afbs_compile.explain().rewritten == 2
    assert distance(found, one(x())) < EXACT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_aot_inductor_packages_a_dense_program(force, tmp_path):
    one = model()
    with torch.no_grad():
        exported = torch.export.export(ours(one, force), (x(),))
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2")
        )
        found = torch._inductor.aoti_load_package(package)(x())
        assert distance(found, one(x())) < EXACT
    assert force.graphs == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd(force):
    """The backward graph that Dynamo captures holds no attention call of ours that it cannot."""
    one = model()
    one(x()).square().mean().backward()
    want = [weight.grad.clone() for weight in one.parameters()]
    one.zero_grad()
    compiled = ours(one, force)
    compiler = torch.compile(backend=forced.counting([]))
    with torch._dynamo.compiled_autograd._enable(compiler):
        compiled(x()).square().mean().backward()
    grads = [weight.grad for weight in one.parameters()]
    assert max(map(distance, grads, want)) < 10 * EXACT


def test_first_calls_of_many_threads(force):
    """One model in four threads and another in two: everything right, each tuned once."""
    models = [model(0), model(1)]
    compiled = [ours(one, force) for one in models]
    jobs = [(0, 200), (0, 200), (1, 200), (0, 130), (1, 130), (0, 200)]
    found, start = {}, threading.Barrier(len(jobs))

    def call(n, which, length):
        start.wait()
        with torch.no_grad():
            found[n] = compiled[which](x(length))

    threads = [threading.Thread(target=call, args=(n, *job)) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (which, length) in enumerate(jobs):
        assert distance(found[n], models[which](x(length))) < EXACT
    assert len(force.problems) == 2


class Shared(nn.Module):
    """Another class over the same weights: attends without a mask."""

    def __init__(self, other):
        super().__init__()
        self.inner = other

    def forward(self, x):
        return F.silu(self.inner(x))


def test_models_take_turns(force):
    """Of one class, and of another over the same weights; each keeps its own thresholds."""
    models = [model(0), model(1)]
    models.append(Shared(models[0]))
    compiled = [ours(one, force) for one in models]
    with torch.no_grad():
        for turn in range(2):
            for one, call in zip(models, compiled, strict=True):
                assert distance(call(x(seed=turn)), one(x(seed=turn))) < EXACT
    graphs = force.graphs
    force.move(lambda site: (Head("window", 1.0, window=8, sink=0),) * site.heads)
    with torch.no_grad():
        assert distance(compiled[1](x()), models[1](x())) > 1e-3
    assert force.graphs == graphs


class Cross(nn.Module):
    """Attends from some tokens to others."""

    def forward(self, x, memory):
        q, k = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (x, memory))
        return F.scaled_dot_product_attention(q, k, k)


def test_few_queries_of_many_keys_are_none_to_tune_with(force):
    """A chunk of a prompt that is shorter than `min_length` runs dense, however long the rest."""
    options = {"min_length": 200, "cache_dir": force.cache_dir}
    call, memory = torch.compile(Cross(), backend="afbs", options=options), x(300)
    chunks = [x(length) for length in (100, 130, 250)]
    for one in (memory, *chunks):
        torch._dynamo.mark_dynamic(one, 1)
    for one, tuned in zip(chunks, (0, 0, 1), strict=True):
        with torch.no_grad():
            assert distance(call(one, memory), Cross()(one, memory)) < EXACT
        assert len(force.problems) == tuned
    assert force.graphs == 1


@pytest.mark.slow
def test_cache_artifacts_travel():
    """What Inductor compiled is found again after it was carried to an empty cache."""
    one = model()
    with forced.forced(forced.every(1.0), "inductor") as force, torch.no_grad():
        want = ours(one, force)(x())
        artifacts, _ = torch.compiler.save_cache_artifacts()
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            torch.compiler.load_cache_artifacts(artifacts)
            torch._dynamo.utils.counters.clear()
            found = ours(one, force)(x())
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["fxgraph_cache_hit"] > 0
    assert counters["fxgraph_cache_miss"] == 0
    assert torch.equal(found, want)
