"""`generate()`: the prompt runs sparse, decoding stays as it is, nothing more is compiled."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import afbs_compile
from afbs_compile.bench import forced

transformers = pytest.importorskip("transformers")
MIN_LENGTH, NEW = 16, 3
LENGTHS = (90, 70)  # of prompts: sizes become symbolic
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]
WAYS: Mapping[str, dict[str, Any]] = {
    "dynamic cache": {},
    "chunks": {"prefill_chunk_size": 40},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "assisted": {"prompt_lookup_num_tokens": 3},
}
QUICK = ("chunks",)
PREFILLS = ("dynamic cache", "chunks", "assisted")  # without a mask that depends on an input


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def compiled(model):
    """Compiles the model's forward pass, and takes that back."""

    def compile_afresh(**settings):
        torch._dynamo.reset()
        model.compile(**settings)
        return model

    yield compile_afresh
    model._compiled_call_impl = None


def generated(model, **settings):
    """Greedy tokens after prompts of every length."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (1, n), generator=draw) for n in LENGTHS]
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    return [model.generate(p, **settings) for p in prompts]


def ours(force):
    """Keywords of `compile` for our backend."""
    options = {"min_length": MIN_LENGTH, "cache_dir": force.cache_dir}
    return {"backend": "afbs", "options": options}


@pytest.mark.parametrize(
    "way", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)
def test_tokens_and_graphs_are_those_without_us(model, compiled, way):
    settings, graphs = WAYS[way], []
    want = generated(model, **settings)
    generated(compiled(backend=forced.counting(graphs)), **settings)
    with forced.interpreted(), forced.forced(forced.every(1.0)) as force:
        found = generated(compiled(**ours(force)), **settings)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    assert force.graphs <= len(graphs)
    if way in PREFILLS:
        report = afbs_compile.explain()
        assert report.rewritten > 0
        assert all(reason.startswith("short: ") for reason in report.reasons)


@pytest.mark.slow
def test_the_compilation_of_generate_itself(model, compiled):
    """`generate` compiles decoding over a static cache by itself; it may do so with us."""
    settings = {"cache_implementation": "static"}
    want = generated(model, **settings, disable_compile=True)
    with forced.interpreted(), forced.forced(forced.every(1.0)) as force:
        own = transformers.CompileConfig(**ours(force) | {"fullgraph": False, "mode": None})
        own._compile_all_devices = True
        found = generated(model, **settings, compile_config=own)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    assert force.graphs > 0
    assert afbs_compile.explain().rewritten == 0
