"""Problems for the kernels' tests, drawn by shape and seed."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from afbs_compile.kernels.geometry import Mask, token_visible
from afbs_compile.kernels.lists import to_keep

LOWEST = torch.finfo(torch.float32).min


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


def problem_of(policy_tensor, mask):
    """One problem with several heads, odd lengths and blocks of two sizes."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (smooth(generator, 1, heads, 107, 32) for heads in (4, 2, 2))
    return Problem(q, k, v, policy_tensor(4, tau=1.0), mask, 0.3, 32, 16)


@st.composite
def data_masks(draw, problem, kinds=("right", "left", "holes", "segments", "packed", "elements")):
    """The parts of a mask that comes with the call, as the op takes them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    (batch, heads, length_q, _), length_k = problem.q.shape, problem.k.shape[2]
    parts, kind = [None] * 4, draw(st.sampled_from(kinds))
    j = torch.arange(length_k)
    ends = torch.randint(0, length_k + 1, (batch, 1), generator=generator)
    if kind == "right":
        parts[0] = j < ends
    elif kind == "left":
        parts[0] = (j >= ends)[:, None, None]
    elif kind == "holes":
        parts[0] = torch.rand(batch, length_k, generator=generator) < 0.5
    elif kind in ("segments", "packed"):
        if kind == "packed":  # runs, as texts that stand behind each other
            ids = (torch.rand(batch, length_q + length_k, generator=generator) < 0.05).cumsum(1)
        else:
            ids = torch.randint(0, 3, (batch, length_q + length_k), generator=generator)
        parts[1] = ids[:, :length_q] if kind == "packed" else ids[:, None, :length_q, None]
        parts[2] = ids[:, :length_k] if kind == "packed" else ids[:, None, None, -length_k:]
        parts[0] = j < ends if draw(st.booleans()) else None
    else:
        b, h = (batch, 1) if kind == "elements" else draw(st.sampled_from([(1, heads), (1, 1)]))
        share = draw(st.sampled_from([0.01, 0.5, 0.99]))
        parts[3] = torch.rand(b, h, length_q, length_k, generator=generator) < share
        parts[3][:, :, : length_q // 3, length_k // 2 :] = False
        parts[3][:, :, length_q // 2 :, : length_k // 2] = True
    return parts


@st.composite
def biases(draw, problem, kinds=("relative", "alibi", "hidden", "lowest", "padding", "random")):
    """Additive masks of all broadcast shapes and strides, with rows that see nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    (batch, heads, length_q, _), length_k = problem.q.shape, problem.k.shape[2]
    b, h = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    i, j = torch.arange(length_q)[:, None], torch.arange(length_k)
    kind = draw(st.sampled_from(kinds))
    if kind == "padding":
        ends = torch.randint(0, length_k + 1, (b, 1, 1, 1), generator=generator)
        return torch.where(j < ends, 0.0, draw(st.sampled_from([-torch.inf, LOWEST, -1e4])))
    slopes = torch.rand(1, h, 1, 1, generator=generator)
    if kind == "alibi":
        return -(i - j).abs() * slopes
    table = 3 * torch.randn(h, 32, generator=generator)
    bias = table[:, ((j - i).abs() // 3).clamp(max=31)].expand(b, -1, -1, -1)
    if kind == "relative":
        return bias
    if kind == "random":  # strides that are not in order
        return torch.randn(h, length_k, b, length_q, generator=generator).permute(2, 0, 3, 1)
    low = LOWEST if kind == "lowest" else -torch.inf
    bias = bias.masked_fill(torch.rand(length_q, length_k, generator=generator) < 0.5, low)
    bias[:, :, : length_q // 3, length_k // 3 :] = low
    bias[:, :, length_q // 2 :, : length_k // 2] = low
    bias[:, :, draw(st.integers(0, length_q - 1))] = low
    return bias


def hidden_dense(problem, parts):
    """SDPA under the site's mask and the parts of another, each from its definition."""
    keys, q_segments, k_segments, elements = parts
    seen = problem.seen()[None, None]
    if keys is not None:
        seen = seen & keys.reshape(len(keys), 1, 1, -1)
    if k_segments is not None:
        q_segments = q_segments.reshape(len(q_segments), 1, -1, 1)
        seen = seen & (q_segments == k_segments.reshape(len(k_segments), 1, 1, -1))
    if elements is not None:
        seen = seen & elements
    group = problem.q.shape[1] // problem.k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (problem.k, problem.v))
    q = problem.q.float()
    seen = seen.expand(*q.shape[:3], k.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=problem.scale)
    return out.masked_fill(~seen.any(3)[..., None], 0), seen


@pytest.fixture(name="problem_of", scope="session")
def problem_of_mask(policy_tensor):
    return functools.partial(problem_of, policy_tensor)


@pytest.fixture(name="data_masks", scope="session")
def data_masks_strategy():
    return data_masks


@pytest.fixture(name="biases", scope="session")
def biases_strategy():
    return biases


@pytest.fixture(name="hidden_dense", scope="session")
def hidden_dense_oracle():
    return hidden_dense


@pytest.fixture(name="problems", scope="session")
def problems_strategy(policy_tensor):
    return functools.partial(problems, policy_tensor)


def with_tangents(q, k, v, counts, indices, policy, *, mask, scale, block_m, block_n):
    """Kept keys and the tangents of dropped blocks in one softmax, block by block: o and lse."""
    q, k, v = (x.double() for x in (q, k, v))
    group, keep = q.shape[1] // k.shape[1], to_keep(counts, indices)
    o, lse = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    for b, h in itertools.product(*map(range, q.shape[:2])):
        keys, values = k[b, h // group], v[b, h // group]
        for n, i in enumerate(torch.arange(q.shape[2], device=q.device).split(block_m)):
            rows, centre = q[b, h, i], q[b, h, i].mean(0)
            logits, values_seen = [], []
            for j in torch.arange(k.shape[2], device=q.device).split(block_n):
                seen = token_visible(mask, policy[h : h + 1], i, j)[0]
                if keep[b, h, n, j[0] // block_n]:
                    s = (scale * rows @ keys[j].T).masked_fill(~seen, -torch.inf)
                    logits.append(s)
                    values_seen.append(values[j].masked_fill(~seen.any(0)[:, None], 0))
                elif seen.all():
                    s = scale * keys[j] @ centre
                    p = s.softmax(0)
                    mean_key = p @ keys[j]
                    bias = s.logsumexp(0) - scale * centre @ mean_key
                    logits.append((scale * rows @ mean_key + bias)[:, None])
                    values_seen.append((p @ values[j])[None])
            if logits:
                s = torch.cat(logits, 1)
                lse[b, h, i] = s.logsumexp(1)
                o[b, h, i] = s.softmax(1).nan_to_num(0) @ torch.cat(values_seen)
            else:
                lse[b, h, i] = -torch.inf
    return o, lse


@pytest.fixture(name="with_tangents", scope="session")
def with_tangents_oracle():
    return with_tangents
