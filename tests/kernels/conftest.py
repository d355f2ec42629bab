"""Problems for the kernels' tests, drawn by shape and seed."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from afbs_compile.kernels.geometry import Mask


@dataclass(frozen=True)
class Problem:
    """One attention call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    policy: torch.Tensor
    mask: Mask
    scale: float
    block_m: int
    block_n: int

    @property
    def site(self):
        return {"mask": self.mask, "scale": self.scale} | self.blocks

    @property
    def blocks(self):
        return {"block_m": self.block_m, "block_n": self.block_n}

    def seen(self):
        """The site's mask as SDPA's boolean attn_mask, written from its definition."""
        i = torch.arange(self.q.shape[2])[:, None]
        j = torch.arange(self.k.shape[2])[None]
        if not self.mask.causal:
            return torch.ones(self.q.shape[2], self.k.shape[2], dtype=torch.bool)
        reach = j <= i + self.mask.offset
        return reach & (j > i + self.mask.offset - self.mask.window) if self.mask.window else reach

    def dense(self):
        """SDPA in fp32; rows that see nothing are 0."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.float().repeat_interleave(group, 1) for x in (self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(
            self.q.float(), k, v, self.seen(), scale=self.scale
        )
        return out.masked_fill(~self.seen().any(1)[:, None], 0)


def smooth(generator, *shape):
    """Random tensors whose neighbours resemble each other, as tokens of a text do."""
    noise = torch.randn(*shape, generator=generator)
    return noise.cumsum(2) / shape[2] ** 0.5 + 0.5 * noise


@st.composite
def problems(draw, policy_tensor, longest=170, tau=None, one_kind=False):
    """Lengths that are no multiple of a block, GQA, offsets, windows, strided views."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [(1, 1), (2, 1), (1, 3), (2, 2)]  # one kind for what is compiled for each
    kv_heads, group = draw(st.sampled_from(kinds[-1:] if one_kind else kinds))
    batch = draw(st.integers(2 if one_kind else 1, 2))
    dim = draw(st.sampled_from([32] if one_kind else [32, 40, 64]))
    shortest = 130 if one_kind else 1  # a single block is another compilation
    length_q = draw(st.integers(shortest, longest))
    length_k = length_q if draw(st.booleans()) else draw(st.integers(shortest, longest))
    kind = draw(st.sampled_from(["full", "causal", "from the end", "window"]))
    offset = length_k - length_q if kind in ("from the end", "window") else 0
    window = draw(st.integers(1, longest)) if kind == "window" else 0
    q, k, v = (
        smooth(generator, batch, heads, length, dim).transpose(1, 2).contiguous().transpose(1, 2)
        for heads, length in ((kv_heads * group, length_q), (kv_heads, length_k),
                              (kv_heads, length_k))
    )  # fmt: skip
    kept = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])) if tau is None else tau
    return Problem(
        q, k, v, policy_tensor(kv_heads * group, tau=kept),
        Mask(kind != "full", offset, window), 0.3,
        draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32])),
    )  # fmt: skip


@pytest.fixture(name="problems", scope="session")
def problems_strategy(policy_tensor):
    return functools.partial(problems, policy_tensor)
