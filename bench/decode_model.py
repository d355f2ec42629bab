"""A model that generates, for a benchmark: shapes of a real one, weights and cache of noise.

How fast a step is does not depend on values. Every variant is compiled whole, and on a GPU its
step is one CUDA graph. A step appends a token: caches have room for `SLACK` more than is measured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    StaticCache,
)

from afbs_compile.hybrid_attention import NAME
from afbs_compile.hybrid_cache import HybridCache, HybridLayer
from afbs_compile.hybrid_layout import layout

SLACK = 64  # tokens that a measurement may append
WHOLE = "afbs-bench-whole"  # SDPA over a whole static cache, without a mask
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 1 << 18,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 1 << 12,
    },
}  # fmt: skip


def network(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A Llama of a known size with random weights; `layers` replaces its depth."""
    depth = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig(**MODELS[name] | depth)
    with device:
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return made.eval()


def whole(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers that takes every row of a cache for a token.

    What SDPA can do at its best for one query: no mask, no repeated heads, flash decoding.
    """
    out = sdpa(query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(WHOLE, whole)
AttentionMaskInterface.register(WHOLE, lambda **_: None)


def static_cache(config: Any, batch: int, tokens: int, like: Tensor) -> StaticCache:
    """The static cache of transformers, full of noise."""
    cache = StaticCache(config, tokens + SLACK)
    dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, dim, like.dtype, like.device)
    fill(cache, tokens)
    return cache


def hybrid_cache(
    config: Any, batch: int, tokens: int, ratio: float, window: int, sink: int, like: Tensor
) -> HybridCache:
    """A cache in which a share of each layer's KV heads has a window, full of noise."""
    heads = config.num_key_value_heads
    few = round(ratio * heads)
    layers = []
    for n in range(config.num_hidden_layers):
        kept = [(window, sink) if (h + n) % heads < few else None for h in range(heads)]
        layers.append(HybridLayer(layout(kept, tokens + SLACK), batch))
    cache = HybridCache(layers)
    cache.allocate(config, like.dtype, like.device)
    fill(cache, tokens)
    for layer in cache.layers:
        layer.lengths.fill_(tokens)
        layer.filled = True
    return cache


def fill(cache: Any, tokens: int) -> None:
    """Noise in all layers, which then hold so many tokens."""
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def stepper(model: Any, cache: Any, attention: str, batch: int) -> Callable[[], Any]:
    """A call that generates one more token, greedily, for every sequence."""
    model.set_attn_implementation(attention)
    device = model.device
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    forward: Any = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        with torch.no_grad():
            logits = forward(input_ids=ids, past_key_values=cache).logits
            ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

    return captured(step) if device.type == "cuda" else step


def captured(step: Callable[[], None]) -> Callable[[], Any]:
    """A step as one CUDA graph."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


ATTENTION = {"hybrid": NAME, "ratio0": NAME, "static": "sdpa", "whole": WHOLE}
