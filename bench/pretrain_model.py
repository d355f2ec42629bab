"""Which model is trained? A small Llama over bytes, from scratch, compiled block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afbs_compile.commands.errors import CommandError
from afbs_compile.training.scratch import Attention, budget_policy

BYTES = 256  # the vocabulary
THETA = 500_000.0  # of the rotary embedding, as Llama 3's
SPREAD = 0.02  # of initial weights


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of a model.

    Attributes:
        layers: Blocks.
        hidden: Channels.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of a head; heads may be wider together than `hidden`, as Qwen3's.
        inner: Channels inside the MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int


CONFIGS = {
    "small": Config(12, 768, 12, 4, 64, 2048),
    "wide": Config(6, 256, 16, 4, 128, 768),  # attention is a large share already at 8k tokens
    "tiny": Config(2, 64, 2, 1, 32, 128),
}


def config(name: str) -> Config:
    """The sizes of a name.

    Raises:
        CommandError: There is no such name.
    """
    if name not in CONFIGS:
        raise CommandError(f"no model {name!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[name]


class SelfAttention(nn.Module):
    """Causal, with rotary positions and grouped heads."""

    def __init__(self, sizes: Config) -> None:
        """Make the projections."""
        super().__init__()
        self.sizes = sizes
        own, shared = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q = nn.Linear(sizes.hidden, own, bias=False)
        self.k = nn.Linear(sizes.hidden, shared, bias=False)
        self.v = nn.Linear(sizes.hidden, shared, bias=False)
        self.o = nn.Linear(own, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend: `x` `[B, L, hidden]`, `cos` and `sin` `[L, head_dim]`."""
        dim = self.sizes.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (rotated(t, cos, sin).type_as(v) for t in (q, k))
        grouped = self.sizes.heads != self.sizes.kv_heads
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, sizes: Config) -> None:
        """Make the parts."""
        super().__init__()
        self.before, self.between = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.attention = SelfAttention(sizes)
        self.gate = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` `[B, L, hidden]` and the rotary tables to the next block's `x`."""
        x = x + self.attention(self.before(x), cos, sin)
        y = self.between(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Llama(nn.Module):
    """Predicts the next byte; forward gives the mean loss, nats a byte."""

    def __init__(self, sizes: Config) -> None:
        """Make the blocks, with the weights of the current seed."""
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(BYTES, sizes.hidden)
        self.layers = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, BYTES, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("o.weight", "down.weight"))
                depth = (2 * sizes.layers) ** -0.5 if last else 1.0
                nn.init.normal_(weight, std=SPREAD * depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss over `tokens` int64 `[B, L + 1]`."""
        x = self.embed(tokens[:, :-1])
        cos, sin = rotary(x.shape[1], self.sizes.head_dim, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @property
    def sites(self) -> dict[str, Attention]:
        """The modules that attend, by path."""
        s = self.sizes
        shape = Attention(s.heads, s.kv_heads, s.head_dim)
        return {f"layers.{n}.attention": shape for n in range(s.layers)}


def rotary(length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim]` of the rotary embedding."""
    inverse = THETA ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.arange(length, device=device).float()[:, None] * inverse
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[B, H, L, D]` turned by its positions; halves are pairs."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def made(sizes: Config, seed: int, device: torch.device) -> Llama:
    """A model with the weights of a seed, the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llama(sizes).to(device)


def compiled(
    model: Llama, budget: float, longest: int, folder: Path, *, dynamic: bool | None = None
) -> Llama:
    """The model with each block compiled by afbs, under budgets; the policy goes to `folder`."""
    path = folder / "policy.json"
    path.write_text(budget_policy(model, model.sites, budget, longest).to_json())
    options = {"policy": str(path), "min_length": 128}
    for block in model.layers:
        block.compile(backend="afbs", options=options, dynamic=dynamic)
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW as small Llamas are trained."""
    cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )


def warm_up(rate: float, steps: int) -> Callable[[int], float]:
    """The learning rate of a step: it rises over the first `steps`, then stays."""
    return lambda step: rate * min(1.0, (step + 1) / max(steps, 1))
