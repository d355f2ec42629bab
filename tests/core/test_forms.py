"""Attention that is not written as SDPA, end to end: found, and equal to dense with all kept."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import afbs_compile
from afbs_compile import backend, runner, source
from afbs_compile.calibrate import describe
from afbs_compile.policy import Head, Site
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS

LENGTH = 80
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "clean")


@pytest.fixture
def clean():
    JOURNAL.clear()
    RUNNERS.clear()
    yield
    JOURNAL.clear()


@pytest.fixture
def graphs(monkeypatch, tuning):
    """Every site is sparse with all blocks kept; graphs run as they are, and are listed."""

    def resolve(problem, layer, given):
        sites = {
            s.name: Site(s.name, (Head("sparse", 1.0),) * s.heads, s.kv_heads, s.head_dim,
                         describe(s), "sparse", None)
            for s in problem.sites
        }  # fmt: skip
        return tuning(length=problem.length, sites=sites)

    compiled = []
    monkeypatch.setattr(runner, "resolve", resolve)
    monkeypatch.setattr(
        backend, "inductor", lambda gm, inputs, options: compiled.append(gm) or gm.forward
    )
    return compiled


def compare(model, *args, **kwargs):
    """Run a model both ways and compare the outputs; the report of its sites."""
    model = model.eval() if isinstance(model, nn.Module) else model
    compiled = torch.compile(model, backend="afbs", options={"min_length": 16})
    with torch.no_grad():
        torch.testing.assert_close(
            first(compiled(*args, **kwargs)), first(model(*args, **kwargs)), atol=1e-5, rtol=1e-5
        )
    return afbs_compile.explain()


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def ops(graphs):
    targets = [n.target for gm in graphs for n in gm.graph.nodes]
    return targets.count(torch.ops.afbs.attention.default)


def ids():
    return torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64, attn_implementation="eager")
    )


def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        intermediate_size=64, attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        intermediate_size=64, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config)


def t5():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=64, d_kv=32, num_layers=2, num_heads=2, vocab_size=64, d_ff=64,
        attn_implementation="eager",
    )  # fmt: skip
    return T5EncoderModel(config)


@pytest.mark.parametrize("make", [gpt2, gpt_neox, bert])
@pytest.mark.parametrize("use_cache", [True, False])
def test_eager_models_are_rewritten(graphs, make, use_cache):
    options = {} if make is bert else {"use_cache": use_cache}
    report = compare(make(), ids(), **options)
    assert (len(report.sites), ops(graphs)) == (2, 2)


@pytest.mark.parametrize("training", [False, True])
def test_torch_encoders_are_rewritten(graphs, training):
    layer = nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    compiled = torch.compile(model.train(training), backend="afbs", options={"min_length": 16})
    with torch.no_grad():
        x = torch.randn(2, LENGTH, 64)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert [s.name for s in afbs_compile.explain().sites] == [
        "layers.0.self_attn", "layers.1.self_attn"
    ]  # fmt: skip
    assert ops(graphs) == 2


class Mixed(nn.Module):
    """A checkpointed chain under autocast, and torch's own attention."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 192)
        self.outer = nn.MultiheadAttention(64, 2, batch_first=True)

    def attend(self, x):
        q, k, v = self.inner(x).unflatten(-1, (2, 96)).transpose(1, 2).chunk(3, -1)
        return x + ((q @ k.mT).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = checkpoint(self.attend, x, use_reentrant=False)
        return self.outer(x, x, x)[0]


def test_forms_within_forms_are_calibrated_and_rewritten(monkeypatch, graphs):
    """Through the real calibration, with its thresholds set aside afterwards."""
    real, kept = source.resolve, runner.resolve
    monkeypatch.setattr(runner, "resolve", lambda *args: (real(*args), kept(*args))[1])
    model, x = Mixed(), torch.randn(1, 320, 64)
    compiled = torch.compile(model, backend="afbs", options={"min_length": 16})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=0.02, rtol=0.02)
    assert not torch.is_autocast_enabled("cpu")
    assert (ops(graphs), len(afbs_compile.explain().sites)) == (2, 2)
    assert afbs_compile.explain().calibration.cache == "miss"


def test_a_position_bias_is_added_in_the_kernel(graphs):
    report = compare(t5(), ids())
    assert ops(graphs) == len(report.sites) == 2
    assert not report.reasons


def test_attention_weights_that_are_returned_are_refused(graphs):
    report = compare(bert(), ids(), output_attentions=True)
    assert ops(graphs) == 0
    assert {r.split(" (")[0] for r in report.reasons} == {"attention weights have other users"}


def test_padding_in_a_float_mask_is_exact(graphs):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 60:] = 0
    report = compare(bert(), ids(), attention_mask=mask)
    assert ops(graphs) == len(report.sites) > 0
    assert not report.reasons
