"""Is the quality benchmark's judge fair? With every block kept nothing may be lost."""

import pytest
import torch

from afbs_compile.bench import compensation
from afbs_compile.bench.compensation import Setting

transformers = pytest.importorskip("transformers")


class Tiny:
    """A random language model with two layers, in the form of the demo's."""

    def __init__(self):
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        torch.manual_seed(0)
        self.module = transformers.LlamaForCausalLM(config).eval()

    def inputs(self, window):
        return {"input_ids": window[None], "use_cache": False}


def test_divergence_is_that_of_torch():
    p, q = (torch.randn(1300, 50, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    want = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert compensation.divergence(p, q) == pytest.approx(float(want), rel=1e-4)
    assert compensation.divergence(p, p) == 0


def test_rows_of_a_small_model():
    model = Tiny()
    attention = compensation.install(model.module)
    window = torch.randint(97, (512,), generator=torch.Generator().manual_seed(2))
    settings = [Setting(tau=1.0), Setting(tau=0.3), Setting(tau=0.3, compensation="tangent")]
    everything, plain, tangent = compensation.measured(model, attention, window, settings, 1)
    assert everything["density"] == 1
    assert everything["kl"] < 1e-6
    assert everything["perplexity_sparse"] == pytest.approx(everything["perplexity_dense"])
    assert plain["density"] < 0.95
    assert 0 < tangent["kl"] < plain["kl"]
    assert min(row[name] for row in (plain, tangent) for name in row if "seconds" in name) > 0
