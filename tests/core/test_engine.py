"""Models that run without `torch.compile`: the compile path's policies, sites and results."""

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile import aliases, backend, cache, engine, rulings, shelf
from afbs_compile.kernels.geometry import Mask
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import bucket_of
from afbs_compile.report import JOURNAL

LENGTH = 512
OPTIONS = {"min_length": 128, "max_error": 0.3}
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "always_faster", "clean")


class Attention(nn.Module):
    """Attention whose heads look at few tokens; `causal` or not."""

    def __init__(self, causal=True):
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v = (nn.Linear(64, n * 32) for n in (2, 1, 1))
        for proj in (self.q, self.k):
            proj.weight.data *= 4

    def forward(self, x, mask=None):
        q, k, v = (p(x).unflatten(-1, (-1, 32)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal and mask is None, enable_gqa=True
        )
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers, the second one called twice."""

    def __init__(self, seed=0, causal=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([Attention(causal) for _ in range(2)])

    def forward(self, x, mask=None):
        for layer in (*self.layers, self.layers[1]):
            x = layer(x, mask)
        return x


def tokens(length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, length, 64, generator=generator)
    return 0.3 * noise + noise.cumsum(1) / length**0.5


@pytest.fixture
def clean(monkeypatch):
    """No journal, no Inductor."""
    JOURNAL.clear()
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    yield
    JOURNAL.clear()


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def rewritten():
    return {s.name: s.calls for s in afbs_compile.explain().sites if s.decision == "sparse"}


def only_policy():
    (entry,) = cache.entries()
    return entry.policy


def taus(policy, tau):
    """The policy with one tau everywhere."""
    tunings = []
    for tuning in policy.tunings:
        sites = {
            name: replace(s, heads=tuple(replace(h, mode="sparse", tau=tau) for h in s.heads))
            for name, s in tuning.sites.items()
        }
        tunings.append(replace(tuning, sites=sites))
    return replace(policy, tunings=tuple(tunings))


@pytest.mark.parametrize("first", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_one_policy_serves_both_paths(first):
    model, x = Model(), tokens()
    dense = run(model, x)
    outs = {}
    for path in (first, "compiled" if first == "eager" else "eager"):
        if path == "eager":
            with afbs_compile.sparse(model, **OPTIONS):
                outs[path] = run(model, x)
        else:
            outs[path] = run(torch.compile(model, backend="afbs", options=OPTIONS), x)
    report = afbs_compile.explain()
    assert [c.cache for c in report.calibrations] == ["miss", "hit"]
    assert torch.equal(outs["eager"], outs["compiled"])
    assert not torch.allclose(outs["eager"], dense)
    names = ["layers.0", "layers.1", "layers.1#1"]
    assert sorted(only_policy().sites()) == names
    assert {n for n, calls in rewritten().items() if calls} == set(names)
    assert torch.equal(run(model, x), dense)


def test_a_later_start_finds_the_policy_without_a_trace(monkeypatch):
    model, x = Model(), tokens()
    with afbs_compile.sparse(model, **OPTIONS):
        tuned = run(model, x)
    monkeypatch.setattr(shelf, "Tracer", lambda options: None)
    with afbs_compile.sparse(model, **OPTIONS):
        assert torch.equal(run(model, x), tuned)


@pytest.mark.slow
def test_ahead_of_time_tuning_is_found_without_a_trace(monkeypatch):
    model, x = Model(), tokens()
    afbs_compile.tune(model, [x], **OPTIONS)
    monkeypatch.setattr(shelf, "Tracer", lambda options: None)
    with afbs_compile.sparse(model, **OPTIONS):
        run(model, x)
    assert len(rewritten()) == 3


def test_everything_kept_is_dense_and_policies_are_swapped():
    model, x = Model(), tokens()
    dense = run(model, x)
    with afbs_compile.sparse(model, **OPTIONS):
        tuned = run(model, x)
        assert afbs_compile.use_policy(taus(only_policy(), 1.0)) == 1
        torch.testing.assert_close(run(model, x), dense, atol=1e-5, rtol=1e-5)
        assert afbs_compile.use_policy(only_policy()) == 1
        assert torch.equal(run(model, x), tuned)


@pytest.mark.slow
def test_a_policy_file_is_used_as_it_is(tmp_path):
    model, x = Model(), tokens()
    dense = run(model, x)
    afbs_compile.tune(model, [x], **OPTIONS)
    file = tmp_path / "policy.json"
    file.write_text(taus(only_policy(), 1.0).to_json())
    with afbs_compile.sparse(model, **OPTIONS, policy=file):
        torch.testing.assert_close(run(model, x), dense, atol=1e-5, rtol=1e-5)
    assert len(rewritten()) == 3
    JOURNAL.clear()
    other = Model(seed=1)
    with afbs_compile.sparse(other, **OPTIONS, policy=file), pytest.warns(AfbsWarning):
        assert torch.equal(run(other, x), run(Model(seed=1), x))
    assert set(afbs_compile.explain().reasons) == {"the policy file is of another model"}


@pytest.mark.slow
def test_a_new_length_is_tuned_at_its_second_call_and_short_ones_are_dense():
    model = Model()
    with afbs_compile.sparse(model, **OPTIONS):
        run(model, tokens(512))
        JOURNAL.clear()
        assert torch.equal(run(model, tokens(100)), run(Model(), tokens(100)))
        assert not rewritten()
        assert not torch.equal(run(model, tokens(500)), run(Model(), tokens(500)))  # same bucket
        assert [t.bucket for t in only_policy().tunings] == [bucket_of(512)]
        JOURNAL.clear()
        run(model, tokens(200))
        assert f"not tuned yet for up to {bucket_of(200)} tokens" in afbs_compile.explain().reasons
        run(model, tokens(200))
    assert [t.bucket for t in only_policy().tunings] == [bucket_of(200), bucket_of(512)]
    assert len(rewritten()) == 3


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=3)
def test_many_lengths_never_meet_the_recompile_limit():
    model, lengths = Model(), (160, 200, 260, 330, 400)
    assert len({bucket_of(n) for n in lengths}) == len(lengths)
    with afbs_compile.sparse(model, **OPTIONS):
        for length in lengths:
            run(model, tokens(length))
            run(model, tokens(length))
            JOURNAL.clear()
            run(model, tokens(length))
            assert len(rewritten()) == 3


def test_a_watched_model_can_be_collected():
    model = Model()
    afbs_compile.sparse(model, **OPTIONS)
    run(model, tokens())
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_masks_of_their_own_are_exact_and_gradients_flow():
    model, x = Model(), tokens()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(3)
    mask[300:] &= torch.arange(LENGTH) % 7 > 0
    dense = run(model, x, mask)
    with afbs_compile.sparse(model, **OPTIONS):
        assert not torch.equal(run(model, x, mask), dense)
        assert len(rewritten()) == 3
        afbs_compile.use_policy(taus(only_policy(), 1.0))
        torch.testing.assert_close(run(model, x, mask), dense, atol=1e-5, rtol=1e-5)
        JOURNAL.clear()
        bias = torch.zeros(LENGTH, LENGTH)
        run(model, x, bias)
        assert afbs_compile.explain().reasons == {"additive float mask": 3}
        model(x).sum().backward()
    assert model.layers[0].q.weight.grad.abs().sum() > 0


def test_a_policy_of_another_mask_is_refused():
    model, x = Model(causal=True), tokens()
    with afbs_compile.sparse(model, **OPTIONS):
        run(model, x)
        for layer in model.layers:
            layer.causal = False
        dense = run(Model(causal=False), x)
        assert torch.equal(run(model, x), dense)
    assert any("mask that is 'causal'" in r for r in afbs_compile.explain().reasons)


class Data(nn.Module):
    """Breaks Dynamo's graph."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x, lock=None):
        if x.sum().item() > 1e9:
            x = x * 2
        return self.attention(x)


@pytest.mark.slow
def test_graph_breaks_do_not_matter():
    model, x = Data(), tokens()
    dense = run(model, x)
    with afbs_compile.sparse(model, **OPTIONS):
        assert not torch.equal(run(model, x), dense)
    assert rewritten() == {"attention": 1}


def test_inputs_that_cannot_be_copied_run_dense():
    model, x = Data(), tokens()
    dense = run(model, x)
    with afbs_compile.sparse(model, **OPTIONS):
        with pytest.warns(AfbsWarning, match="cannot be traced.*afbs_compile.tune"):
            assert torch.equal(run(model, x, threading.Lock()), dense)
        assert not torch.equal(run(model, x), dense)


def test_an_exception_leaves_nothing_behind():
    model, x = Model(), tokens()
    with afbs_compile.sparse(model, **OPTIONS) as running:
        run(model, x)
        with pytest.raises(RuntimeError):
            run(model, x[..., :5])
        assert not torch.overrides._get_current_function_mode_stack()
        assert not running.running.paths
        assert not running.running.modes
        run(model, x)


def test_copies_and_pickles_of_a_watched_model_are_plain():
    model, x = Model(), tokens()
    dense = run(model, x)
    with afbs_compile.sparse(model, **OPTIONS):
        tuned = run(model, x)
        assert torch.equal(run(copy.deepcopy(model), x), dense)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), dense)
        assert torch.equal(run(model, x), tuned)


@pytest.mark.slow
def test_other_models_are_not_touched():
    model, other, x = Model(), Model(seed=1), tokens()
    dense = run(other, x)
    with afbs_compile.sparse(model, **OPTIONS):
        run(model, x)
        assert torch.equal(run(other, x), dense)


def test_a_damaged_alias_is_a_miss():
    model, x = Model(), tokens()
    with afbs_compile.sparse(model, **OPTIONS):
        tuned = run(model, x)
    path = aliases.path_of(aliases.module_key(model))
    whole = path.read_text()
    for text in (whole[:-5], whole.replace("models", "model"), whole.replace(": 1", ": 2"), ""):
        path.write_text(text)
        with pytest.warns(AfbsWarning, match="traced again"):
            assert aliases.load(path.stem) is None
    with afbs_compile.sparse(model, **OPTIONS), pytest.warns(AfbsWarning):
        assert torch.equal(run(model, x), tuned)
    assert path.read_text() == whole


@pytest.mark.parametrize("offset", [-3, 0, 5])
@pytest.mark.parametrize("window", [0, 4, 50])
def test_descriptions_hold_what_a_compiled_graph_may_say(offset, window):
    """Masks that are equal at a size share a description; others do not."""
    from afbs_compile.passes.masks import as_tensor, classify

    like = torch.empty(9, 9 + max(offset, 0))
    mask = Mask(True, offset, window)
    tensor = as_tensor(mask, like)
    found = classify(tensor)
    if not tensor.any(1).all():
        return  # rows that see nothing: a graph may name the mask otherwise
    words = "causal" + (f", offset {found.offset}" if found.offset else "")
    words += f", window {found.window}" if found.window else ""
    assert words in rulings.descriptions(mask, *like.shape)
    assert "full" not in rulings.descriptions(mask, *like.shape)


def test_signatures_tell_shapes_apart():
    x = torch.zeros(2, 3)
    assert engine.signature((x,), {"y": [x[0]]}) == ((2, 3), (3,))
    assert engine.most_numbers((x, 7), {}) == 6
    assert engine.most_numbers((), {}) == 0
