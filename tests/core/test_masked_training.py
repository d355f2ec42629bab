"""Padded batches are trained sparse; with every block kept gradients are the dense model's."""

import pytest
import torch

import afbs_compile
from afbs_compile import backend, calibrate
from afbs_compile.kernels import dispatch
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.timing import Speed

transformers = pytest.importorskip("transformers")
LENGTH = 200
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1}
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "uncompiled", "fast")


@pytest.fixture
def fast(monkeypatch):
    """Graphs run as they are, sparse calls count as faster; nothing is left behind."""
    JOURNAL.clear()
    RUNNERS.clear()
    monkeypatch.setattr(calibrate, "measure", lambda *_: Speed(1.0, 0.0, 0.5))
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    yield
    JOURNAL.clear()


def llama(implementation):
    config = transformers.LlamaConfig(attn_implementation=implementation, **GROUPED)
    return transformers.LlamaModel(config)


def bert(implementation):
    config = transformers.BertConfig(attn_implementation=implementation, **SIZES)
    return transformers.BertModel(config, add_pooling_layer=False)


def t5(implementation):
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def built(make, implementation="sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = make(implementation).eval(), torch.randint(0, 64, (3, LENGTH))
    return model, ids


def padding(side, *missing):
    at, missing = torch.arange(LENGTH), torch.tensor(missing)[:, None]
    return ((at >= missing) if side == "left" else (at < LENGTH - missing)).long()


def gradients(call, model, ids, padded):
    """Of all weights, of a loss that reads padding too."""
    model.zero_grad()
    out = call(input_ids=ids, attention_mask=padded)[0]
    # no sum of squares: the last norm keeps that the same whatever came before
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(
    ("make", "implementation", "side", "mask"),
    [
        (llama, "sdpa", "right", "causal + key padding"),
        (llama, "eager", "left", "causal + key padding"),  # rows that see nothing: means of v
        (bert, "eager", "right", "full + key padding"),
    ],
)
def test_gradients_are_the_dense_models(make, implementation, side, mask):
    model, ids = built(make, implementation)
    options = {"min_length": 64, "max_error": 0.0001, "rule": "tau"}
    compiled = torch.compile(model, backend="afbs", fullgraph=True, options=options)
    for missing in ((0, 70, 155), (10, 0, 199)):
        padded = padding(side, *missing)
        got = gradients(compiled, model, ids, padded)
        want = gradients(model, model, ids, padded)
        assert got.keys() == want.keys()
        # a key's bias moves all scores of a row alike: its gradient is a rest of rounding
        rest = 1e-7 * max(x.abs().max().item() for x in want.values())
        for name, theirs in want.items():
            close = {"atol": max(1e-4 * theirs.abs().max().item(), rest), "rtol": 1e-4}
            torch.testing.assert_close(got[name], theirs, **close)
    report = afbs_compile.explain()
    assert report.rewritten == 2
    assert {site.mask for site in report.sites} == {mask}


def test_a_position_bias_that_is_trained_stays_dense():
    model, ids = built(t5)
    compiled = torch.compile(model, backend="afbs", options={"min_length": 64})
    padded = padding("right", 0, 70, 150)
    got, want = (gradients(call, model, ids, padded) for call in (compiled, model))
    for name, theirs in want.items():
        torch.testing.assert_close(got[name], theirs, atol=1e-6, rtol=1e-4)
    (site,) = afbs_compile.explain().sites
    assert "no gradient of a mask that is added" in site.reason
    with torch.no_grad():  # and a call without gradients is another graph
        compiled(input_ids=ids, attention_mask=padded)
    assert afbs_compile.explain().rewritten == 1


def test_gradients_of_what_is_kept_only(monkeypatch):
    """The op's own backward ran: without it the model's gradients would not come at all."""
    model, ids = built(llama)
    calls, real = [], dispatch.backward

    def noted(*args, data, **more):
        calls.append(data)
        return real(*args, data=data, **more)

    monkeypatch.setattr(dispatch, "backward", noted)
    compiled = torch.compile(model, backend="afbs", fullgraph=True, options={"min_length": 64})
    gradients(compiled, model, ids, padding("right", 0, 70, 150))
    assert [data.kind for data in calls] == ["key padding"] * 2
