"""How does a generating model keep only what its heads read? A transformers cache of two kinds.

KV heads that a policy gives a window keep `sink + window` tokens in a ring, the others all. Shapes
are static and the state is on the device, so decoding compiles once and fits CUDA graphs. A model
reads it through the attention implementation `afbs-hybrid` (`afbs_compile.hybrid_attention`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from afbs_compile import hybrid_store
from afbs_compile.hybrid_attention import Arriving
from afbs_compile.hybrid_layout import Layout, kept_by_group, layout, sites_by_layer, tuning_for
from afbs_compile.hybrid_prefill import Rules, rules
from afbs_compile.policy import Policy, Site


class HybridLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The cache of one layer. Row b of all tensors is sequence b.

    Attributes:
        layout: Which head keeps what.
        rules: How a long prompt attends, or None: dense.
        keys, values: `[max_batch, rows, D]`.
        lengths: int32 `[max_batch]`, tokens of a sequence without its padding.
        cumulative_length: int64 scalar, tokens of all sequences with their padding.
        filled: Whether there may be tokens.
    """

    keys: Any
    values: Any
    lengths: Any
    cumulative_length: Any
    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, layout: Layout, max_batch: int, rules: Rules | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout, self.max_batch, self.rules = layout, max_batch, rules
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        self.filled = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for heads of this size, type and device.

        Raises:
            ValueError: The number of KV heads is not the layout's.
        """
        if key_states.shape[1] != self.layout.kv_heads:
            raise ValueError(
                f"the model has {key_states.shape[1]} KV heads, the cache {self.layout.kv_heads}: "
                "was it made from this model's config?"
            )
        hybrid_store.allocate(self, key_states, value_states)
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Arriving, Tensor]:
        """Hand the new tokens on to the attention function, which knows the padding and stores."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return Arriving(self, key_states), value_states

    def append(self, k: Tensor, v: Tensor, fresh: Tensor | None) -> None:
        """Store new tokens.

        Args:
            k: `[B, Hkv, n, D]`, B no more than `max_batch`.
            v: `[B, Hkv, n, Dv]`.
            fresh: int32 `[B]`, how many of them, at the end, are no padding; None for all.

        Raises:
            ValueError: More sequences or tokens than there is room for.
        """
        batch, _, count, _ = k.shape
        if batch > self.max_batch or count > self.layout.longest:
            raise ValueError(
                f"{batch} sequences of {count} new tokens do not fit a HybridCache of max_batch="
                f"{self.max_batch} and max_len={self.layout.longest}"
            )
        if count == 1:
            hybrid_store.put_one(self, k, v)
        else:
            hybrid_store.put_many(self, k, v, fresh)
        self.lengths[:batch].add_(count if fresh is None else fresh)
        self.cumulative_length.add_(count)
        self.filled = True

    @property
    def size_bytes(self) -> int:
        """Bytes of keys and values; 0 before they are allocated."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.layout.longest, 0

    def get_seq_length(self) -> Any:
        """Tokens so far, padding included: 0, or a tensor on the device."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.layout.longest

    get_max_cache_shape = get_max_length  # its name in older releases

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.cumulative_length.zero_()
        if self.is_initialized:
            self.lengths.zero_()
        self.filled = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b goes on from sequence `beam_idx[b]`; the memory stays where it is."""
        if self.is_initialized:
            for x in (self.keys, self.values, self.lengths):
                x[: len(beam_idx)] = x.index_select(0, beam_idx.to(x.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0: what left a window is gone.

        Raises:
            ValueError: Tokens shall be taken back.
        """
        if tokens_to_remove:
            raise ValueError("a HybridCache cannot take tokens back: what left a window is gone")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the batch is static."""
        raise ValueError("a HybridCache does not change its batch; repeat the inputs instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: the batch is static."""
        raise ValueError("a HybridCache does not change its batch; select inputs instead")


class HybridCache(Cache):
    """Keys and values of all layers, each KV head with the tokens that it reads."""

    layers: Any

    def __init__(self, layers: Sequence[HybridLayer]) -> None:
        """A cache of these layers; `from_policy` makes them."""
        super().__init__(layers=list(layers))

    @staticmethod
    def from_policy(
        policy: Policy,
        config: Any,
        max_batch: int,
        max_len: int,
        *,
        min_length: int = 2048,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "HybridCache":
        """The cache that a policy asks for.

        Args:
            policy: Heads of mode `window` get a ring; without any, all tokens are kept.
            config: The model's config.
            max_batch: Sequences at a time, at most.
            max_len: Tokens of a sequence, prompt, padding and answer, at most.
            min_length: Prompts from this length on run sparse where the policy says so.
            dtype: With `device`: allocate now, not at the first call.
            device: Where all layers are.

        Raises:
            ValueError: The policy does not fit the model, or a KV group has two minds.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; a cache holds at least 1 sequence")
        text = config.get_text_config(decoder=True)
        refuse(text)
        tuning = tuning_for(policy, max_len)
        layers = [
            HybridLayer(plan(site, text, max_len), max_batch, rules(site, tuning, min_length))
            for site in sites_by_layer(tuning, text.num_hidden_layers)
        ]
        cache = HybridCache(layers)
        if dtype is not None and device is not None:
            cache.allocate(text, dtype, device)
        return cache

    def allocate(self, config: Any, dtype: torch.dtype, device: torch.device | str) -> None:
        """Take the memory now, as a compiled prefill and `torch.export` need."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = [layer.layout.kv_heads for layer in self.layers]
        self.early_initialization(
            self.layers[0].max_batch, heads, dim, dtype, torch.device(device)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all keys and values; 0 before they are allocated."""
        return sum(layer.size_bytes for layer in self.layers)


def refuse(config: Any) -> None:
    """Raise a ValueError for a model whose layers are not all plain causal attention."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None):
        told = ", ".join(sorted(kinds)) or f"a sliding window of {config.sliding_window}"
        raise ValueError(f"a HybridCache needs layers of full causal attention, not {told}")


def plan(site: Site | None, config: Any, longest: int) -> Layout:
    """The layout of the layer of a site; all tokens where there is none."""
    count = config.num_key_value_heads
    if site is None:
        return layout([None] * count, longest)
    if (site.kv_heads, len(site.heads)) != (count, config.num_attention_heads):
        raise ValueError(
            f"{site.name} has {len(site.heads)} heads over {site.kv_heads} KV heads, the model "
            f"{config.num_attention_heads} over {count}: the policy is another model's"
        )
    return layout(kept_by_group(site), longest)
