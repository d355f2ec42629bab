"""What could a stranger's model look like? Small random ones, drawn by seed, told in a line.

Layers differ in how attention is written, in masks, head counts, layouts and residuals. The same
description builds the model as its author would, or (`policies`) with block-sparse attention in
plain torch in place of every call whose mask is known without looking at data.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afbs_compile.kernels import dispatch, reference, selection
from afbs_compile.kernels.geometry import Mask

WIDTH = 64
FORMS = (
    "positional", "keyword", "grouped", "repeated", "interleaved", "scaled after",
    "scaled before", "multihead", "encoder layer",
)  # fmt: skip
PLAIN_MASKS = ("full", "causal", "tril", "window")
DATA_MASKS = ("padding", "causal padding", "packed", "any")
OTHER_MASKS = ("band", "prefix", "alibi", "float")
HEADS = ((2, 2, 32), (4, 2, 32), (4, 1, 32), (2, 2, 40), (4, 4, 16))
LENGTHS = (1, 2, 7, 63, 64, 65, 100, 128, 200, 257, 320)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer: how it is written, what it sees, its heads, layout and residual."""

    form: str
    mask: str
    heads: tuple[int, int, int]
    layout: str
    scale: float | None
    residual: str
    cross: bool
    checkpointed: bool

    def __str__(self) -> str:
        """What is not the usual."""
        words = [f"{self.form}, {self.mask}, heads {self.heads}, {self.layout}, {self.residual}"]
        words += [f"scale {self.scale}"] * (self.scale is not None)
        words += ["cross"] * self.cross + ["checkpointed"] * self.checkpointed
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Description:
    """A model and its inputs.

    Attributes:
        seed: Draws weights and inputs.
        layers: In order.
        batch: Sequences.
        length: Queries.
        memory: Keys of cross-attention.
        dtype: Of weights and inputs.
        dynamic: As `torch.compile` takes it.
    """

    seed: int
    layers: tuple[Attention, ...]
    batch: int
    length: int
    memory: int
    dtype: str
    dynamic: bool

    def __str__(self) -> str:
        """Everything, a layer a part."""
        own = [f.name for f in fields(self) if f.name != "layers"]
        about = ", ".join(f"{name} {getattr(self, name)}" for name in own)
        return f"{about}: {'; '.join(map(str, self.layers))}"


def describe(seed: int) -> Description:
    """The model of a seed."""
    draw = random.Random(seed)
    return Description(
        seed=seed,
        layers=tuple(layer(draw) for _ in range(draw.choice((1, 1, 2, 3)))),
        batch=draw.choice((1, 1, 2, 3)),
        length=draw.choice(LENGTHS),
        memory=draw.choice(LENGTHS),
        dtype=draw.choice(("float32",) * 6 + ("bfloat16", "float16")),
        dynamic=draw.random() < 0.3,
    )


def layer(draw: random.Random) -> Attention:
    """A random layer."""
    form = draw.choice(FORMS)
    masks = draw.choice((PLAIN_MASKS, PLAIN_MASKS, DATA_MASKS, OTHER_MASKS))
    heads = draw.choice(HEADS)
    return Attention(
        form=form,
        mask=draw.choice(masks),
        heads=heads if form in FORMS[2:5] else (heads[0], heads[0], heads[2]),
        layout=draw.choice(("transposed", "contiguous", "fused")),
        scale=draw.choice((None, None, None, 0.1, 1.0)),
        residual=draw.choice(("none", "after", "before", "gated")),
        cross=form not in FORMS[7:] and draw.random() < 0.2,
        checkpointed=draw.random() < 0.1,
    )


def inputs(what: Description) -> dict[str, Tensor]:
    """`x` `[B, L, W]`, `memory` `[B, M, W]`, and the tokens to keep `[B, max(L, M)]`."""
    generator = torch.Generator().manual_seed(what.seed)
    dtype = DTYPES[what.dtype]
    longest = max(what.length, what.memory)
    ends = torch.randint(1, longest + 1, (what.batch, 1), generator=generator)
    x, memory = (
        torch.randn(what.batch, n, WIDTH, generator=generator).to(dtype)
        for n in (what.length, what.memory)
    )
    return {"x": x, "memory": memory, "keep": torch.arange(longest) < ends}


def build(what: Description, policies: Mapping[int, Tensor] | None = None) -> nn.Module:
    """The model; `policies` float32 `[H, COLUMNS]` by layer make those layers block-sparse."""
    with torch.random.fork_rng():
        torch.manual_seed(what.seed)
        model = Model([module_of(one) for one in what.layers])
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, 0, 1.5 * weight[0].numel() ** -0.5)
    for n, policy in (policies or {}).items():
        layer = model.layers[n]
        assert isinstance(layer, Layer)
        layer.policy = policy
    return model.to(DTYPES[what.dtype]).eval()


def module_of(what: Attention) -> nn.Module:
    """The layer of a description."""
    return Opaque(what) if what.form in ("multihead", "encoder layer") else Layer(what)


def independent(what: Attention) -> bool:
    """Can block-sparse attention take the layer's place without looking at the graph?"""
    return what.mask in PLAIN_MASKS and what.form not in FORMS[7:]


def geometry(what: Attention, length_q: int, length_k: int) -> Mask:
    """The mask of an independent layer."""
    offset = 0 if what.mask == "causal" else length_k - length_q
    if what.mask == "full":
        return Mask()
    return Mask(True, offset, 40 if what.mask == "window" else 0)


def seen(name: str, length_q: int, length_k: int, keep: Tensor) -> Tensor | None:
    """The boolean mask of a name, `[1 or B, 1, Lq, Lk]`; None where there is none."""
    if name in ("full", "causal", "alibi", "float"):
        return None
    i = torch.arange(length_q)[:, None] + (length_k - length_q)
    j = torch.arange(length_k)[None]
    rows = keep[:, None, None, :length_k]
    if name == "padding":
        return rows
    if name == "packed":
        part = keep[:, :length_k].long().cumsum(1) // 50
        q_part = part[:, -length_q:] if length_q <= length_k else part[:, -1:]
        return (q_part[:, None, :, None] == part[:, None, None, :]) & (j <= i)
    if name == "any":
        return (rows & ((i * 7 + j * 3) % 5 != 0)) | (i == j)
    plain = {
        "tril": j <= i,
        "window": (j <= i) & (j > i - 40),
        "band": (j - i).abs() <= 30,
        "prefix": (j <= i) | (j < 20),
        "causal padding": j <= i,
    }[name][None, None]
    return plain & rows if name == "causal padding" else plain


def bias(name: str, length_q: int, length_k: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The additive mask of a name, `[1, H or 1, Lq, Lk]`; None where there is none."""
    i = torch.arange(length_q)[:, None] + (length_k - length_q)
    j = torch.arange(length_k)[None]
    if name == "alibi":
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        return (-slopes[:, None, None] * (i - j).abs()).to(dtype)[None]
    if name == "float":
        return torch.zeros(length_q, length_k, dtype=dtype).masked_fill(j > i, -math.inf)[
            None, None
        ]
    return None


class Model(nn.Module):
    """Some layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        """Take them."""
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """Run them one after another."""
        for one in self.layers:
            x = one(x, memory, keep)
        return x


class Layer(nn.Module):
    """Attention that is written out."""

    def __init__(self, what: Attention) -> None:
        """Draw projections."""
        super().__init__()
        self.what = what
        self.policy: Tensor | None = None
        heads, kv_heads, dim = what.heads
        self.sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.norm = nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(WIDTH, sum(self.sizes))
        self.out = nn.Linear(heads * dim, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """Attention and its residual."""
        what, y = self.what, x
        if what.residual in ("before", "gated"):
            y = self.norm(x)
        other = memory if what.cross else y
        if what.checkpointed:
            o: Tensor = checkpoint(self.attention, y, other, keep, use_reentrant=False)
        else:
            o = self.attention(y, other, keep)
        if what.residual == "gated":
            return x + o * torch.sigmoid(x)
        if what.residual == "none":
            return o
        return x + o if what.residual == "before" else self.norm(x + o)

    def attention(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """Project, attend, project."""
        q, k, v = self.projected(x, memory)
        o = self.sparse(q, k, v) if self.policy is not None else self.attend(q, k, v, keep)
        out: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return out

    def projected(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[B, H, L, D]` in the layer's layout."""
        dim = self.what.heads[2]
        if self.what.cross or self.what.layout == "contiguous":
            weights = torch.split(self.proj.weight, self.sizes)
            biases = torch.split(self.proj.bias, self.sizes)
            sources = (x, memory, memory)
            parts = [F.linear(*one) for one in zip(sources, weights, biases, strict=True)]
        else:
            parts = list(torch.split(self.proj(x), self.sizes, -1))
        q, k, v = (torch.unflatten(p, -1, (-1, dim)).transpose(1, 2) for p in parts)
        if self.what.layout == "contiguous":
            return q.contiguous(), k.contiguous(), v.contiguous()
        if self.what.layout == "transposed":
            return q, k.contiguous(), v
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """The call as its author wrote it."""
        what, (heads, kv_heads, _) = self.what, self.what.heads
        mask = seen(what.mask, q.shape[2], k.shape[2], keep)
        if mask is None:
            mask = bias(what.mask, q.shape[2], k.shape[2], heads, q.dtype)
        first, flag = what.mask == "causal", heads != kv_heads
        if what.form == "repeated" and flag:
            k, v = (repeat_kv(t, heads // kv_heads) for t in (k, v))
        elif what.form == "interleaved" and flag:
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        if what.form.startswith("scaled"):
            return chain(q, k, v, mask, first, what)
        if what.form == "positional":
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, first, scale=what.scale)
        grouped: dict[str, Any] = {"enable_gqa": True} if what.form == "grouped" and flag else {}
        return F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, is_causal=first, scale=what.scale, **grouped
        )

    def sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block-sparse attention in plain torch under `policy`."""
        assert self.policy is not None
        mask = geometry(self.what, q.shape[2], k.shape[2])
        scale = q.shape[3] ** -0.5 if self.what.scale is None else self.what.scale
        m, n = dispatch.block_sizes("cpu")
        lists = selection.select(
            q, k, self.policy, mask=mask, scale=scale, selector="sub8", block_m=m, block_n=n
        )
        return reference.forward(
            q, k, v, *lists, self.policy, mask=mask, scale=scale, block_m=m, block_n=n
        )[0]


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Every key head `groups` times, by expansion."""
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)


def chain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: bool, what: Attention
) -> Tensor:
    """Attention as a product, a softmax and a product."""
    scale = q.shape[3] ** -0.5 if what.scale is None else what.scale
    if what.form == "scaled before":
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if first:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1), v)


class Opaque(nn.Module):
    """Attention inside one of torch's own modules."""

    def __init__(self, what: Attention) -> None:
        """Make the module."""
        super().__init__()
        self.what, heads = what, what.heads[0]
        if what.form == "multihead":
            self.inner: nn.Module = nn.MultiheadAttention(WIDTH, heads // 2, batch_first=True)
        else:
            self.inner = nn.TransformerEncoderLayer(
                WIDTH, heads // 2, WIDTH, dropout=0.0, batch_first=True
            )

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """Attend over x; masks are True for what is hidden."""
        n, name = x.shape[1], self.what.mask
        padding = ~keep[:, :n] if "padding" in name else None
        mask = seen(name, n, n, keep) if name in ("tril", "window", "band", "prefix") else None
        hidden = None if mask is None else ~mask[0, 0]
        if self.what.form == "multihead":
            if name == "causal":
                hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
            extra: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": hidden}
            y: Tensor = self.inner(x, x, x, need_weights=False, **extra)[0]
            return y if self.what.residual == "none" else x + y
        out: Tensor = self.inner(x, src_mask=hidden, src_key_padding_mask=padding)
        return out
