"""Models whose batches are padded or packed run sparse, and right, whatever the next batch is."""

from dataclasses import replace

import pytest
import torch

import afbs_compile
from afbs_compile import backend, calibrate
from afbs_compile.policy import Policy
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.source import unpadded
from afbs_compile.timing import Speed

transformers = pytest.importorskip("transformers")
LENGTH = 300
SIZES = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "max_position_embeddings": 512, "attn_implementation": "sdpa",
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
OPTIONS = {"min_length": 64, "max_error": 0.3}
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "fast")


@pytest.fixture
def fast(monkeypatch):
    """Graphs run as they are, sparse calls count as faster; nothing is left behind."""
    JOURNAL.clear()
    RUNNERS.clear()
    compiled = []
    monkeypatch.setattr(calibrate, "measure", lambda *_: Speed(1.0, 0.0, 0.5))
    monkeypatch.setattr(
        backend, "inductor", lambda gm, inputs, options: compiled.append(gm) or gm.forward
    )
    yield compiled
    JOURNAL.clear()


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def mistral():
    config = transformers.MistralConfig(sliding_window=150, **GROUPED)
    return transformers.MistralForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def padding(side, *missing):
    at = torch.arange(LENGTH)
    missing = torch.tensor(missing)[:, None]
    return ((at >= missing) if side == "left" else (at < LENGTH - missing)).long()


def packing(*lengths):
    texts = [torch.arange(n) for n in (*lengths, LENGTH - sum(lengths))]
    return torch.cat(texts).expand(3, -1).contiguous()


MISSING = (0, 70, 255), (0, 0, 0), (9, 1, 299)
TEXTS = (100,), (31, 200), (7, 7)
BATCHES = {
    "left": [{"attention_mask": padding("left", *n)} for n in MISSING],
    "right": [{"attention_mask": padding("right", *n)} for n in MISSING],
    "packed": [{"position_ids": packing(*n), "use_cache": False} for n in TEXTS],
}


@pytest.mark.parametrize(
    ("make", "batches", "mask"),
    [
        (llama, "left", "causal + key padding"),
        (mistral, "right", "causal, window 150 + key padding"),
        (llama, "packed", "causal + segments"),
        pytest.param(bert, "right", "full + key padding", marks=pytest.mark.slow),
        pytest.param(mistral, "left", "causal, window 150 + key padding", marks=pytest.mark.slow),
    ],
)
def test_next_batches_need_no_compilation(make, batches, mask, fast):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        ids = torch.randint(0, 64, (3, LENGTH))
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    with torch.no_grad():
        compiled(ids, **BATCHES[batches][0])
        report = afbs_compile.explain()
        assert report.rewritten == 2
        assert {site.mask for site in report.sites} == {mask}
        keep_everything(report.calibration.policy_path)
        for batch in BATCHES[batches]:
            out, want = compiled(ids, **batch)[0], model(ids, **batch)[0]
            real = batch.get("attention_mask", torch.ones_like(ids)).bool()
            torch.testing.assert_close(out[real], want[real], atol=1e-5, rtol=1e-5)
    assert len(fast) == 1


def keep_everything(path):
    """The stored policy with every tau 1, in use from the next call on."""
    policy, tunings = Policy.read(path), []
    for tuning in policy.tunings:
        sites = {
            name: replace(
                site, heads=tuple(replace(h, mode="sparse", tau=1.0) for h in site.heads)
            )
            for name, site in tuning.sites.items()
        }
        tunings.append(replace(tuning, sites=sites))
    assert afbs_compile.use_policy(replace(policy, tunings=tuple(tunings))) == 1


def test_padded_and_unpadded_calls_share_a_tuning():
    assert unpadded("causal + key padding") == "causal"
    assert unpadded("causal + key padding + segments") == "causal + segments"
    assert unpadded("causal, window 7") == "causal, window 7"
