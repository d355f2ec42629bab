"""A hybrid cache: prefill and decoding give what masked dense attention gives, in less memory."""

import datetime
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import afbs_compile
from afbs_compile import hybrid_prefill
from afbs_compile.hybrid_cache import HybridCache
from afbs_compile.kernels import decode as kernel
from afbs_compile.kernels import policy_columns as columns
from afbs_compile.policy import Head, Policy, Site, Tuning, bucket_of

KINDS = [(1, 1), (2, 1), (2, 2), (3, 2)]  # KV heads, query heads of each


def policy(kept, group, length=64, other=None):
    """A policy: `kept[layer][KV head]` is `(window, sink)`; None stands for `other`."""
    sites = {}
    for layer, pairs in enumerate(kept):
        heads = [
            Head("window", 1.0, window=pair[0], sink=pair[1])
            if pair
            else other or Head("dense", 1.0)
            for pair in pairs
            for _ in range(group)
        ]
        name = f"model.layers.{layer}.self_attn"
        sites[name] = Site(name, tuple(heads), len(pairs), 16, "causal", "sparse")
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat()
    made = Tuning(
        bucket_of(length), length, {"selector": "sub8"}, True, 0, 0.0, 0.0, now, "cpu", {}, (),
        sites,
    )  # fmt: skip
    return Policy("tiny", "tiny", (made,))


def model(kv_heads, group, layers=2, dim=16):
    config = LlamaConfig(
        vocab_size=64, hidden_size=8 * kv_heads * group, intermediate_size=32, head_dim=dim,
        num_hidden_layers=layers, num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(kv_heads * 10 + group)
        return LlamaForCausalLM(config).eval()


def oracle_mask(batch_size, attention_mask=None, **_):
    return attention_mask.bool()[:, None, None]


def oracle_attention(module, query, key, value, attention_mask, scaling, **_):
    """Every score, then every rule of visibility, from its definition."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    position = torch.arange(query.shape[2])
    i, j = position[:, None], position[None]
    first = (~attention_mask[:, 0, 0]).sum(1)[:, None, None]  # [B, 1, 1]: the first real token
    seen = []
    for pair in module.kept:
        window, sink = pair or (math.inf, 0)
        seen.append((j <= i) & (j >= first) & ((j > i - window) | (j < first + sink)))
    seen = torch.stack(seen, 1).repeat_interleave(group, 1)
    scores = (query @ keys.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ values).transpose(1, 2), None


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", oracle_mask)


@torch.no_grad()
def wanted(net, kept, ids, mask):
    """Logits of all tokens by one dense pass under the heads' masks."""
    for layer, pairs in zip(net.model.layers, kept, strict=True):
        layer.self_attn.kept = pairs
    net.set_attn_implementation("oracle")
    return net(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


@torch.no_grad()
def found(net, cache, ids, mask, chunks):
    """The same through a cache, some tokens at a time."""
    net.set_attn_implementation("afbs-hybrid")
    logits, start = [], 0
    for count in chunks:
        end = start + count
        part = net(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
            position_ids=positions(mask)[:, start:end],
        )  # fmt: skip
        logits.append(part.logits)
        start = end
    return torch.cat(logits, 1)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def inputs(lengths, total, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(total) >= total - length for length in lengths]).long()
    return torch.randint(64, (len(lengths), total), generator=generator), mask


def check(kind, kept, lengths, chunks, longest, atol=1e-5, dim=16, other=None, **options):
    kv_heads, group = kind
    net = model(kv_heads, group, len(kept), dim)
    ids, mask = inputs(lengths, sum(chunks))
    cache = HybridCache.from_policy(
        policy(kept, group, longest, other), net.config, len(lengths) + 1, longest, **options
    )
    ours, real = found(net, cache, ids, mask, chunks), mask.bool()
    torch.testing.assert_close(ours[real], wanted(net, kept, ids, mask)[real], rtol=0, atol=atol)
    assert ours.isfinite().all()
    return cache


@pytest.mark.parametrize("kind", [(2, 2), (2, 1)])
def test_two_hundred_steps(kind):
    kept = [[(16, 4), None], [(7, 2), (30, 0)]]
    check(kind, kept, [40, 25, 3], [40] + [1] * 200, 240)


@st.composite
def sessions(draw):
    """Layouts, ragged batches, chunks of any size and steps, around the turns of the rings."""
    kind = draw(st.sampled_from(KINDS))
    pair = st.none() | st.tuples(st.integers(1, 12), st.integers(0, 5))
    kept = draw(
        st.lists(st.lists(pair, min_size=kind[0], max_size=kind[0]), min_size=2, max_size=2)
    )
    chunks = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    total = sum(chunks)
    lengths = draw(st.lists(st.integers(1, total), min_size=1, max_size=3))
    steps = draw(st.integers(0, 8))
    lengths = [length + steps for length in lengths]
    return kind, kept, lengths, chunks + [1] * steps, total + steps + draw(st.integers(0, 5))


@given(sessions())
@example(((2, 2), [[(4, 2), None], [None, None]], [6, 5, 4], [6], 8))
@example(((2, 2), [[(4, 2), None], [(4, 2), (4, 2)]], [7, 6, 5], [5, 1, 1], 7))
@example(((2, 2), [[(4, 2), (4, 2)], [(1, 0), (1, 0)]], [12, 2, 1], [5, 5, 1, 1], 12))
@example(((2, 1), [[(8, 4), None], [None, (3, 9)]], [3, 2], [2, 1], 40))  # all shorter than sinks
@example(((2, 2), [[(6, 3), None]] * 2, [12, 9], [8, 4], 20))  # a ring that is not full yet
@example(((2, 2), [[(2, 0), None]] * 2, [4, 3], [1, 3], 6))  # a chunk of padding alone
@settings(max_examples=20)
def test_any_session(session):
    check(*session)


@pytest.mark.parametrize(
    ("kept", "other"), [((20, 4), None), ((20, 4), Head("sparse", 1.0)), (None, None)]
)
def test_one_launch_of_a_long_prompt(kept, other, monkeypatch):
    """Windowed, dense and sparse heads in one call, though the batch is padded."""
    monkeypatch.setattr(hybrid_prefill, "masked", None)  # that path is not taken
    kept = [[kept, None], [None, kept]]
    check(
        (2, 2),
        kept,
        [150, 131, 40],
        [147, 1, 1, 1],
        160,
        min_length=64,
        atol=3e-5,
        dim=32,
        other=other,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [(2, 2), (3, 1)])
def test_without_windows_it_is_the_dense_cache(kind):
    net = model(*kind)
    kept = [[None] * kind[0]] * 2
    ids, _ = inputs([30, 30], 30)
    dense, ours = DynamicCache(config=net.config), HybridCache.from_policy(
        policy(kept, kind[1]), net.config, 2, 64
    )  # fmt: skip
    for start, end in itertools.pairwise([0, 20, 21, 22, 23, 24, 25, 26]):
        net.set_attn_implementation("sdpa")
        wanted = net(ids[:, start:end], past_key_values=dense).logits
        net.set_attn_implementation("afbs-hybrid")
        assert torch.equal(net(ids[:, start:end], past_key_values=ours).logits, wanted)
    for layer, mirror in zip(ours.layers, dense.layers, strict=True):
        kept = layer.keys.unflatten(1, (kind[0], 64))
        assert torch.equal(kept[:, :, :26], mirror.keys)
        assert not kept[:, :, 26:].any()
    static = StaticCache(net.config, 64)
    net.set_attn_implementation("sdpa")
    net(ids, past_key_values=static)
    assert ours.size_bytes == sum(x.keys.nbytes + x.values.nbytes for x in static.layers)


@pytest.mark.parametrize("window", [5, 16])
def test_all_heads_with_windows(window):
    cache = check((2, 2), [[(window, 2)] * 2] * 2, [50, 20], [40] + [1] * 20, 64)
    assert cache.size_bytes == 2 * 3 * 2 * 2 * (window + 2) * 16 * 4  # k and v, 3 rows, …


def test_memory_at_32k():
    """Llama-3-8B, three quarters of the heads with a window of 1024: less than 0.28 of all."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    windows = [[(1024, 4)] * 6 + [None] * 2] * 32
    where = {"dtype": torch.bfloat16, "device": "meta"}
    sizes = []
    for kept in (windows, [[None] * 8] * 32):
        cache = HybridCache.from_policy(policy(kept, 4, 32768), config, 8, 32768, **where)
        held = [x for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x)]
        sizes.append(sum(x.nbytes for x in held))
        assert sizes[-1] == pytest.approx(cache.size_bytes, rel=1e-4)
    assert sizes[1] == pytest.approx(8 * 32768 * 32 * 8 * 128 * 2 * 2, rel=1e-4)
    assert sizes[0] <= 0.28 * sizes[1]


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_decoding_compiles_once(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    kept = [[(4, 2), None]]
    net = model(2, 2, layers=1)
    ids, mask = inputs([26, 9], 26)
    cache = HybridCache.from_policy(policy(kept, 2), net.config, 2, 40)
    found(net, cache, ids, mask, [20])
    ours = []
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(net, fullgraph=True, backend=counter)
    for t in range(20, 26):
        new = step(ids[:, t : t + 1], position_ids=positions(mask)[:, t : t + 1],
                   past_key_values=cache).logits  # fmt: skip
        ours.append(new)
    assert counter.frame_count == 1
    torch.testing.assert_close(
        torch.cat(ours, 1), wanted(net, kept, ids, mask)[:, 20:], rtol=0, atol=1e-5
    )


@pytest.mark.real_inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_token_is_not_written_into_a_copy(monkeypatch):
    net = model(2, 2)
    cache = afbs_compile.HybridCache.from_policy(
        policy([[(4, 2), None]] * 2, 2), net.config, 2, 32
    )
    cache.allocate(net.config, torch.float32, "cpu")
    net.set_attn_implementation("afbs-hybrid")
    run, read = kernel.on_cpu, []

    def spy(q, keys, values, *rest):
        read.append((keys.data_ptr(), values.data_ptr()))
        return run(q, keys, values, *rest)

    monkeypatch.setattr(kernel, "on_cpu", spy)
    step = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        step(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
        read.clear()
        step(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert read == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_prompt_in_chunks():
    from torch._dynamo.testing import CompileCounterWithBackend

    kept = [[(4, 2), None]]
    net = model(2, 2, layers=1)
    ids, mask = inputs([31, 31], 31)
    cache = HybridCache.from_policy(
        policy(kept, 2), net.config, 2, 40, dtype=torch.float32, device="cpu"
    )
    net.set_attn_implementation("afbs-hybrid")
    counter = CompileCounterWithBackend("aot_eager")
    step, ours = torch.compile(net, fullgraph=True, backend=counter), []
    for start, end in itertools.pairwise([0, 20, 27, 28, 29, 30, 31]):
        ours.append(step(ids[:, start:end], past_key_values=cache).logits)
    assert counter.frame_count == 3  # a prompt, a chunk, a token
    torch.testing.assert_close(torch.cat(ours, 1), wanted(net, kept, ids, mask), rtol=0, atol=1e-5)


def generate(net, cache, mask, ids, **options):
    net.set_attn_implementation("sdpa" if cache is None else "afbs-hybrid")
    given = {} if cache is None else {"past_key_values": cache}
    return net.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
        eos_token_id=None, **given, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}, {"num_beams": 3}])
def test_generate(options):
    """Padded prompts, in chunks, and with beams, which the cache follows."""
    net = model(2, 2)
    ids, mask = inputs([17, 6], 17)
    cache = HybridCache.from_policy(policy([[None] * 2] * 2, 2), net.config, 6, 40)
    for _ in range(2):
        ours = generate(net, cache, mask, ids, **options)
        assert torch.equal(ours, generate(net, None, mask, ids, **options))
        cache.reset()


@torch.no_grad()
def test_beams_take_their_windows_along():
    kept = [[(4, 1), None]] * 2
    net, (ids, mask) = model(2, 2), inputs([12, 9, 4], 16)
    mask[:, -4:] = 1
    cache = HybridCache.from_policy(policy(kept, 2), net.config, 3, 20)
    order = torch.tensor([2, 2, 0])
    found(net, cache, ids, mask, [12])
    cache.reorder_cache(order)
    ids = torch.cat([ids[order, :12], ids[:, 12:]], 1)
    mask = torch.cat([mask[order, :12], mask[:, 12:]], 1)
    at = {"position_ids": positions(mask)[:, 12:], "past_key_values": cache}
    ours = net(ids[:, 12:], attention_mask=mask, **at).logits
    torch.testing.assert_close(ours, wanted(net, kept, ids, mask)[:, 12:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_nothing_is_written_beyond_the_end():
    net, (ids, mask) = model(2, 2), inputs([9], 9)
    cache = HybridCache.from_policy(policy([[(3, 1), None]] * 2, 2), net.config, 1, 8)
    found(net, cache, ids, mask, [8])
    with pytest.raises(IndexError):
        net(ids[:, 8:], past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="max_len=8"):
        net(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="max_batch=1"):
        net(ids[:, :4].repeat(2, 1), past_key_values=cache)


@torch.no_grad()
def test_what_it_refuses_while_running():
    net, (ids, mask) = model(2, 2), inputs([8], 8)
    cache = HybridCache.from_policy(policy([[(3, 1), None]] * 2, 2), net.config, 1, 8)
    with pytest.raises(ValueError, match=r'set_attn_implementation\("afbs-hybrid"\)'):
        net(ids, past_key_values=cache)
    net.set_attn_implementation("afbs-hybrid")
    with pytest.raises(ValueError, match="reads a HybridCache only"):
        net(ids)
    with pytest.raises(ValueError, match="padding behind a real token"):
        net(
            ids,
            attention_mask=mask.flip(1).index_fill(1, torch.tensor([7]), 0),
            past_key_values=cache,
        )
    with pytest.raises(ValueError, match="needs 8"):
        net(ids, attention_mask=mask[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="2-D attention_mask"):
        net(ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool), past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        net(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)
    cache.crop(0)


def test_policies_it_refuses():
    config = model(2, 2).config
    good = policy([[(3, 1), None]] * 2, 2)
    mixed = policy([[(3, 1), None]] * 2, 2)
    site = mixed.tunings[0].sites["model.layers.1.self_attn"]
    heads = (site.heads[0], Head("dense", 1.0), *site.heads[2:])
    object.__setattr__(site, "heads", heads)
    other = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    sliding = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sliding.layer_types = ["full_attention", "sliding_attention"]
    for bad, what, sizes, says in (
        (mixed, config, (1, 8), r"layers\.1.*KV head 0 do not agree \(window 3, dense\)"),
        (Policy("m", None), config, (1, 8), "holds no tuning"),
        (policy([[None] * 2] * 3, 2), config, (1, 8), "none of the model's 2 layers"),
        (good, other, (1, 8), "another model's"),
        (good, sliding, (1, 8), "not sliding_attention"),
        (good, config, (0, 8), "max_batch is 0"),
        (good, config, (1, 0), "a bucket needs at least 1|max_len is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            afbs_compile.HybridCache.from_policy(bad, what, *sizes)


def test_a_policy_of_another_length_and_layers_without_sites():
    net = model(2, 2)
    known = policy([[(3, 1), None]], 2, length=4096)
    cache = HybridCache.from_policy(known, net.config, 1, 64)
    assert [len(layer.layout.spans) for layer in cache.layers] == [2, 1]


def test_the_tuning_with_windows_counts():
    """Not the one of the right length, if that knows nothing of windows; among others it does."""
    config = model(2, 2).config
    plain, near, far = (
        policy([[pair, None]] * 2, 2, length=length).tunings[0]
        for length, pair in ((64, None), (64, (3, 1)), (4096, (9, 1)))
    )
    for tunings, longest, window in (
        ((plain, far), 64, 9), ((near, far), 64, 3), ((near, far), 300, 9), ((plain,), 64, None)
    ):  # fmt: skip
        cache = HybridCache.from_policy(Policy("m", None, tunings), config, 1, longest)
        spans = cache.layers[0].layout.spans
        assert [s.window for s in spans[1:]] == ([window] if window else [])


def test_thresholds_belong_to_lengths():
    """A prompt that is too short or too long for them is dense inside its windows."""
    known = policy([[(3, 1), None]], 2, length=100, other=Head("sparse", 0.5))
    layer = HybridCache.from_policy(known, model(2, 2, layers=1).config, 1, 300).layers[0]
    modes = {n: layer.rules.at(n)[:, columns.MODE].tolist() for n in (50, 51, 100, 101)}
    windows, sparse, dense = columns.WINDOWED, columns.SPARSE, columns.DENSE
    assert modes[51] == modes[100] == [windows] * 2 + [sparse] * 2
    assert modes[50] == modes[101] == [windows] * 2 + [dense] * 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_decoding_on_a_gpu(mode):
    kept = [[(16, 4), None]] * 2
    net, (ids, mask) = model(2, 4, dim=64).cuda(), inputs([60, 33], 160)
    mask = (torch.arange(160) >= torch.tensor([[0], [27]])).long()
    at = positions(mask).cuda()
    cache = HybridCache.from_policy(policy(kept, 4), net.config, 2, 200)
    net.set_attn_implementation("afbs-hybrid")
    ids = ids.cuda()
    net(
        ids[:, :60],
        attention_mask=mask[:, :60].cuda(),
        position_ids=at[:, :60],
        past_key_values=cache,
    )
    step = torch.compile(net, fullgraph=True, mode=mode)
    ours = [
        step(ids[:, t : t + 1], position_ids=at[:, t : t + 1], past_key_values=cache).logits.cpu()
        for t in range(60, 160)
    ]
    want = wanted(net.cpu(), kept, ids.cpu(), mask)[:, 60:]
    torch.testing.assert_close(torch.cat(ours, 1), want, rtol=0, atol=2e-3)
