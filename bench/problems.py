"""What is attended to? Shapes, inputs, policies and block lists of the GPU benchmark."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels import dispatch, lists
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible

HEADS = 32
TOPIC = 12  # neighbours that resemble each other in clustered inputs, tokens
BISECTIONS = 12
BLOCK_M, BLOCK_N = dispatch.block_sizes("cuda")  # of the lists, tokens
Lists = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One size of problem; `str` and `parse` are each other's inverse."""

    length: int
    causal: bool = False
    head_dim: int = 128
    kv_heads: int = HEADS

    def __str__(self) -> str:
        """As it is typed."""
        parts = [str(self.length), "causal" if self.causal else "full", f"d{self.head_dim}"]
        return ":".join([*parts, *([f"kv{self.kv_heads}"] if self.kv_heads != HEADS else [])])

    @staticmethod
    def parse(text: str) -> "Shape":
        """The shape `LENGTH[:causal|:full][:dHEAD_DIM][:kvHEADS]`.

        Raises:
            ValueError: That is not one.
        """
        length, *rest = text.strip().split(":")
        found = {"length": length}
        for part in rest:
            if part in ("causal", "full"):
                found["causal"] = part
            elif part.startswith("kv"):
                found["kv_heads"] = part[2:]
            else:
                found["head_dim"] = part.removeprefix("d")
        try:
            sizes = {k: int(v) for k, v in found.items() if k != "causal"}
        except ValueError:
            sizes = {}
        if not sizes or min(sizes.values()) < 1 or HEADS % sizes.get("kv_heads", HEADS):
            raise ValueError(
                f"{text!r} is no shape; give LENGTH[:causal|:full][:dHEAD_DIM][:kvHEADS], "
                f"for example 16384:causal:d64; the key heads must divide {HEADS}"
            )
        return Shape(causal=found.get("causal") == "causal", **sizes)


@dataclass(frozen=True, slots=True)
class Problem:
    """Tensors `[1, H, L, D]` over `[1, L, H, D]` memory, as models hold them."""

    shape: Shape
    kind: str
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def mask(self) -> Mask:
        """The site's mask."""
        return Mask(self.shape.causal)

    @property
    def scale(self) -> float:
        """SDPA's default."""
        return float(self.shape.head_dim**-0.5)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.q.shape[1])

    def visible(self, block_m: int = BLOCK_M, block_n: int = BLOCK_N) -> Tensor:
        """Bool `[NQ, NK]`: which blocks hold a pair that the mask lets through."""
        q, k = (Blocks.of(self.shape.length, b, self.q.device) for b in (block_m, block_n))
        return head_visible(self.mask, policy(1.0, 1, self.q.device), q, k)[0]


def make(
    shape: Shape,
    kind: str = "randn",
    *,
    heads: int = HEADS,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """A problem whose tensors are noise (`randn`) or noise on common topics (`clustered`)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        size = (1, length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    kv_heads = min(shape.kv_heads, heads)
    found = []
    for count in (heads, kv_heads, kv_heads):
        x = normal(count, shape.length)
        if kind == "clustered":
            topics = normal(count, shape.length // TOPIC + 1)
            x += topics.repeat_interleave(TOPIC, 1)[:, : shape.length]
        found.append(x.transpose(1, 2))
    return Problem(shape, kind, *found)


def policy(tau: float, heads: int, device: torch.device | str = "cuda") -> Tensor:
    """All heads sparse at one tau."""
    rows = torch.zeros(heads, col.COLUMNS)
    rows[:, col.MODE], rows[:, col.TAU], rows[:, col.THETA] = col.SPARSE, tau, -1.0
    rows[:, col.LAMBDA], rows[:, col.SINK], rows[:, col.NEIGHBOURS] = -math.inf, BLOCK_N, 2
    return rows.to(device)


def random_keep(problem: Problem, kept: float, block_n: int = BLOCK_N) -> Tensor:
    """Bool `[1, H, NQ, NK]`: random blocks, and always those on the diagonal."""
    device = problem.q.device
    q, k = (Blocks.of(problem.shape.length, b, device) for b in (BLOCK_M, block_n))
    diagonal = (k.last >= q.first[:, None]) & (k.first <= q.last[:, None])
    generator = torch.Generator(device).manual_seed(1)
    size = (1, problem.heads, len(q), len(k))
    wanted = torch.rand(size, generator=generator, device=device) < kept
    return (wanted | diagonal) & problem.visible(BLOCK_M, block_n)


def halved(problem: Problem, keep: Tensor) -> Tensor:
    """The same mask in blocks of half as many keys."""
    finer = keep.repeat_interleave(2, -1)[..., : -(-problem.shape.length // BLOCK_N)]
    return finer & problem.visible()


def share(problem: Problem, counts: Tensor) -> float:
    """How much of the visible blocks some lists visit."""
    return float(counts.sum() / (problem.visible().sum() * counts.shape[:2].numel()))


def select(problem: Problem, tau: float, selector: str = "sub8") -> Lists:
    """The lists that a tau gives."""
    return selected(problem, policy(tau, problem.heads, problem.q.device), selector)


def selected(problem: Problem, rows: Tensor, selector: str) -> Lists:
    """The lists that a policy on the device gives: to copy one there would stop the host."""
    from afbs_compile.kernels import triton_selection

    return triton_selection.select(
        problem.q, problem.k, rows, mask=problem.mask, scale=problem.scale, selector=selector,
        block_m=BLOCK_M, block_n=BLOCK_N,
    )  # fmt: skip


def tau_for(problem: Problem, kept: float, selector: str = "sub8") -> tuple[float, Lists]:
    """The tau at which selection keeps about `kept`, and its lists."""
    if kept >= 1:
        return 1.0, lists.from_keep(problem.visible().expand(1, problem.heads, -1, -1))
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        tau = (low + high) / 2
        counts, _ = select(problem, tau, selector)
        low, high = (tau, high) if share(problem, counts) < kept else (low, tau)
    return tau, select(problem, tau, selector)
