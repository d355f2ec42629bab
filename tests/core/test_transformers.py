"""`attn_implementation="afbs"`: transformers' models with the compile path's policies."""

from functools import partial

import pytest
import torch

import afbs_compile
from afbs_compile import backend, cache, shelf
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.masks import as_tensor
from afbs_compile.report import JOURNAL

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("afbs_compile.integrations.transformers")
masks = pytest.importorskip("afbs_compile.integrations.transformers_masks")
masking_utils = pytest.importorskip("transformers.masking_utils")

OPTIONS = {"min_length": 256, "max_error": 0.3}
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 2048,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "always_faster", "clean")


@pytest.fixture
def clean(monkeypatch):
    """No journal, no Inductor."""
    JOURNAL.clear()
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    yield
    JOURNAL.clear()


def model_of(name="Llama", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ids(length=500, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (batch, length), generator=generator)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def sparse_sites():
    return {s.name: s for s in afbs_compile.explain().sites if s.decision == "sparse"}


def keep_everything(model):
    """From now on every site of the model keeps all blocks."""
    from dataclasses import replace

    for entry in cache.entries():
        tunings = [
            replace(t, sites={
                n: replace(s, heads=tuple(replace(h, mode="sparse", tau=1.0) for h in s.heads))
                for n, s in t.sites.items()
            })
            for t in entry.policy.tunings
        ]  # fmt: skip
        afbs_compile.use_policy(replace(entry.policy, tunings=tuple(tunings)))


def test_one_policy_serves_attn_implementation_and_compile():
    model, x = model_of(), ids()
    dense = logits(model, x)
    hf.enable(model, **OPTIONS)
    eager = logits(model, x)
    assert set(sparse_sites()) == {f"model.layers.{n}.self_attn" for n in range(2)}
    assert not torch.allclose(eager, dense)
    keep_everything(model)
    torch.testing.assert_close(logits(model, x), dense, atol=1e-4, rtol=1e-4)
    hf.disable(model)
    assert torch.equal(logits(model, x), dense)
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    assert torch.equal(logits(compiled, x), eager)
    assert afbs_compile.explain().calibration.cache == "hit"


def test_the_name_alone_finds_a_policy_made_ahead_of_time(monkeypatch):
    model, x = model_of(), ids()
    afbs_compile.tune(model, [{"input_ids": x}], **OPTIONS)
    monkeypatch.setattr(shelf, "Tracer", lambda options: None)
    hf.register(**OPTIONS)
    model.set_attn_implementation("afbs")
    dense = logits(model_of(), x)
    assert not torch.allclose(logits(model, x), dense)
    assert len(sparse_sites()) == 2
    hf.disable(model)


@pytest.mark.slow
def test_the_name_alone_tunes_at_the_second_call_of_a_length():
    model, x = model_of(), ids()
    hf.register(**OPTIONS)
    model.set_attn_implementation("afbs")
    dense = logits(model_of(), x)
    assert torch.equal(logits(model, x), dense)
    assert set(afbs_compile.explain().reasons) == {"not tuned yet for up to 512 tokens"}
    assert not torch.allclose(logits(model, ids(480)), logits(model_of(), ids(480)))
    assert not torch.allclose(logits(model, x), dense)
    hf.disable(model)


def test_generate_prefills_sparse_and_decodes_dense():
    model, x = model_of(), ids()
    want = model.generate(x, max_new_tokens=6, do_sample=False)
    hf.enable(model, **OPTIONS)
    padding = torch.ones_like(x)  # as tokenizers give it
    model.generate(x, attention_mask=padding, max_new_tokens=6, do_sample=False)
    assert {s.calls for s in sparse_sites().values()} == {1}
    keep_everything(model)
    JOURNAL.clear()
    for cache_kind in (None, "static"):
        got = model.generate(x, max_new_tokens=6, do_sample=False, cache_implementation=cache_kind)
        assert torch.equal(got, want)
    hf.disable(model)
    assert not [r for r in afbs_compile.explain().reasons if "not tuned" not in r]


@pytest.mark.slow
def test_chunked_prefill_is_exact_and_sparse():
    model = model_of()
    x = ids(900)

    def chunks(model):
        past = transformers.DynamicCache(config=model.config)
        parts = (x[:, :300], x[:, 300:600], x[:, 600:])
        call = partial(logits, model, past_key_values=past, use_cache=True)
        return torch.cat([call(part) for part in parts], 1)

    want = chunks(model)
    torch.testing.assert_close(want, logits(model, x), atol=1e-4, rtol=1e-4)
    hf.enable(model, **OPTIONS)
    assert not torch.allclose(chunks(model), want, atol=1e-3)
    masks_seen = {s.mask for s in sparse_sites().values()}
    assert any("offset" in m or "from the end" in m for m in masks_seen), masks_seen
    keep_everything(model)
    torch.testing.assert_close(chunks(model), want, atol=1e-4, rtol=1e-4)
    hf.disable(model)


@pytest.mark.slow
def test_a_sliding_window_needs_no_mask_tensor(monkeypatch):
    model, x = model_of("Mistral", sliding_window=200), ids(600)
    dense = logits(model, x)
    hf.enable(model, **OPTIONS)
    assert not torch.allclose(logits(model, x), dense)
    assert {s.mask for s in sparse_sites().values()} == {"causal, window 200"}
    keep_everything(model)
    monkeypatch.setattr(masks.DescribedMask, "tensor", None)  # would fail if it were built
    torch.testing.assert_close(logits(model, x), dense, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    hf.disable(model)


def gradient(model, x, padding):
    """Of one weight of the first layer, of a loss that reads no padding."""
    model.zero_grad()
    model(x, attention_mask=padding).logits[padding.bool()].square().mean().backward()
    return model.model.layers[0].self_attn.k_proj.weight.grad.clone()


def test_padding_is_exact_and_so_are_gradients_under_it():
    model, x = model_of(), ids(batch=2)
    padding = torch.ones_like(x)
    padding[1, :100] = 0
    dense, whole = logits(model, x, attention_mask=padding), logits(model, x)
    real = padding.bool()
    hf.enable(model, **OPTIONS)
    padded = logits(model, x, attention_mask=padding)
    assert len(sparse_sites()) == 2
    assert not torch.equal(padded[real], dense[real])
    JOURNAL.clear()
    logits(model, x, attention_mask=torch.ones_like(x))  # the same policy
    assert len(sparse_sites()) == 2
    keep_everything(model)
    padded = logits(model, x, attention_mask=padding)
    torch.testing.assert_close(padded[real], dense[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, x), whole, atol=1e-4, rtol=1e-4)
    JOURNAL.clear()
    ours = gradient(model, x, padding)
    assert len(sparse_sites()) == 2
    hf.disable(model)
    want = gradient(model, x, padding)
    torch.testing.assert_close(ours, want, atol=1e-4 * want.abs().max().item(), rtol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_with_the_name_is_the_compile_paths():
    model, x = model_of(), ids()
    hf.enable(model, **OPTIONS)
    compiled = torch.compile(model, backend="afbs", options=OPTIONS, fullgraph=True)
    out = logits(compiled, x)
    assert torch.equal(out, logits(model, x))
    hf.disable(model)


@pytest.mark.parametrize("end", [300, 301, 350])
@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("window", [None, 7, 310])
def test_a_described_mask_is_transformers_mask(start, end, window):
    function = masking_utils.causal_mask_function
    if window:
        function = masking_utils.sliding_window_causal_mask_function(window)
    sizes = {"batch_size": 2, "q_length": 300, "kv_length": end, "q_offset": start,
             "mask_function": function, "local_size": window}  # fmt: skip
    mask = masks.afbs_mask(**sizes)
    want = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    if mask is None:
        assert masking_utils.sdpa_mask(**sizes) is None
        return
    assert mask.shape == want.shape
    if isinstance(mask, masks.DescribedMask):
        assert mask.keys is None
        assert torch.equal(as_tensor(mask.rule, want), want[0, 0])
    assert torch.equal(mask & True, want)  # any use builds it
    assert torch.equal(mask[:, :, :, :30], want[..., :30])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept", [(0, 340), (25, 340), (0, 320)])
def test_padding_is_described_by_its_keys(causal, kept):
    padding = torch.zeros(2, 340, dtype=torch.bool)
    padding[0], padding[1, slice(*kept)] = True, True
    function = masking_utils.causal_mask_function if causal else (
        masking_utils.bidirectional_mask_function)  # fmt: skip
    sizes = {"batch_size": 2, "q_length": 300, "kv_length": 340, "q_offset": 40,
             "mask_function": function, "attention_mask": padding}  # fmt: skip
    mask = masks.afbs_mask(**sizes, allow_is_bidirectional_skip=not causal)
    want = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    if mask is None:
        assert bool(want.all())
        return
    found = as_tensor(mask.rule, want).expand_as(want)
    if mask.keys is not None:
        found = found & mask.keys[:, None, None]
    assert torch.equal(found, want)
    assert torch.equal(mask & True, want)


def test_other_functions_of_positions_are_not_described():
    one = torch.zeros(1, dtype=torch.long)
    for function in (
        masking_utils.chunked_causal_mask_function(16, one),
        masking_utils.or_masks(masking_utils.causal_mask_function),
        masking_utils.and_masks(masking_utils.causal_mask_function),
        masking_utils.sliding_window_bidirectional_mask_function(8),
        partial(masking_utils.causal_mask_function),
    ):
        assert masks.described(function) is None
    assert masks.described(masking_utils.bidirectional_mask_function) == Mask()
    window = masking_utils.sliding_window_causal_mask_function(8)
    assert masks.described(window) == Mask(True, window=8)
