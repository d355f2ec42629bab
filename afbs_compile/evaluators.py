"""How good is a threshold at a site? The two ways of measuring that the tuner may call.

`ProfileEvaluator` looks exact answers up in a one-pass profile; `DirectEvaluator` runs the op, and
so works for parameters that no profile covers. Error is the relative L1 of a head's output,
Σ|o − o*| / Σ|o*|, the worst over the batch (its entries count as documents).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from afbs_compile.capture import Layer
from afbs_compile.kernels import dispatch
from afbs_compile.kernels.data_mask import blocked
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.profile import OFF, Profile, profile
from afbs_compile.kernels.selection import select
from afbs_compile.policy import Head
from afbs_compile.policy_tensor import rows
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import Fidelity, Measured, QueryBlocks, SequenceLength, tau_of_u

MOST_ROWS = 64  # query blocks profiled at most: cost grows with length, not with its square


class Layers(Protocol):
    """Where a direct evaluator gets its tensors from."""

    def layer(self, name: str) -> Layer:
        """The captured inputs of a site."""
        ...


def policy_at(taus: Floats, device: torch.device) -> Tensor:
    """Policy tensor `[H, COLUMNS]` of sparse heads with default sink and neighbours."""
    return rows([Head("sparse", float(tau)) for tau in taus], device)


@dataclass(frozen=True, slots=True)
class ProfileEvaluator:
    """Looks error and density up in profile tables.

    Attributes:
        tables: Profile of the whole input as NumPy arrays, by `Profile`'s names.
        lambdas: Levels of the tables, log2 units; the first one is −inf, off.
        prefix: Profile of a prefix, for `SequenceLength` where rows of the whole input will not do
            (a query of a non-causal site sees what comes after it).
        blocks: Query blocks of the whole input.
    """

    tables: dict[str, np.ndarray]
    prefix: dict[str, np.ndarray] | None
    blocks: int
    lambdas: tuple[float, ...] = OFF

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.tables["error"].shape[2])

    @property
    def weights(self) -> Floats:
        """What a unit of each head's error counts `[H]`, 1 in the mean square.

        The root of the head's share of its layer's output: measured to follow the damage better
        than equal weights.
        """
        norm = self.tables["norm"].sum((0, 2), dtype=np.float64)
        total = norm.sum()
        return np.sqrt(norm * len(norm) / total) if total > 0 else np.ones(len(norm))

    @property
    def profile_cost(self) -> float:
        """Dense passes that the tables cost: three, and half a one for every further level.

        As measured on a CPU at 2048 and 4096 tokens.
        """
        return 3.0 + 0.5 * (len(self.lambdas) - 1)

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Error and density at u `[H]` and lambda level `[H]` (None: off).

        Of a block that tau drops all work is saved, of one that lambda leaves out half of it.
        """
        tables = self.tables
        if isinstance(fidelity, SequenceLength) and self.prefix is not None:
            tables = self.prefix
            rows = np.arange(len(tables["rows"]))
        else:
            rows = chosen_rows(tables["rows"], fidelity, self.blocks)
        level = np.zeros(self.heads, dtype=np.int64) if level is None else level
        return look_up(tables, rows, np.asarray(tau_of_u(u)), level)


def look_up(tables: dict[str, np.ndarray], rows: np.ndarray, tau: Floats, level: Ints) -> Measured:
    """Error and density at tau `[H]` and lambda level `[H]` over some of the profiled rows."""
    before = tables["before"][:, :, rows]
    extra = (before < tau[None, :, None, None].astype(np.float32)).sum(-1)
    forced = tables["forced"][:, :, rows]
    extra = np.where(forced == 0, np.maximum(extra, 1), extra)
    extra = np.minimum(extra, tables["visible"][:, :, rows] - forced)
    error, computed = (
        np.take_along_axis(
            at_level(tables[name], level)[:, :, rows], extra[..., None], -1
        )[..., 0].sum(-1)
        for name in ("error", "computed")
    )  # fmt: skip
    norm = tables["norm"][:, :, rows].sum(-1)
    relative = np.divide(error, norm, out=np.zeros(error.shape), where=norm != 0)
    work = 0.5 * ((extra + forced).sum(-1) + computed)
    visible = tables["visible"][:, :, rows].sum((0, 2))
    return Measured(relative.max(0), work.sum(0) / np.maximum(visible, 1))


def at_level(table: np.ndarray, level: Ints) -> np.ndarray:
    """`[B, H, …]` out of `[Z, B, H, …]`: every head at its own level."""
    if not level.any():
        return np.asarray(table[0])
    return np.stack([table[z, :, head] for head, z in enumerate(level)], 1)


def chosen_rows(available: np.ndarray, fidelity: Fidelity, blocks: int) -> np.ndarray:
    """Positions in `available` (query blocks) that a fidelity looks at."""
    if isinstance(fidelity, SequenceLength):
        inside = np.flatnonzero(available < math.ceil(fidelity.fraction * blocks))
        return inside if len(inside) else np.arange(1)
    return spread(len(available), fidelity)


def spread(count: int, fidelity: QueryBlocks) -> np.ndarray:
    """Evenly spread positions among `count`, a `fidelity.fraction` of them."""
    few = max(1, math.ceil(fidelity.fraction * count))
    return ((np.arange(few) + 0.5) * count / few).astype(np.int64)


def profiled(
    layer: Layer,
    *,
    selector: str,
    heads: int,
    low: Fidelity | None = None,
    lambdas: tuple[float, ...] = OFF,
    compensation: str = "none",
    most_rows: int = MOST_ROWS,
) -> ProfileEvaluator:
    """Profile a layer: all query blocks, or `most_rows` spread evenly if there are more."""
    block_m, block_n = dispatch.block_sizes(layer.q.device.type)
    policy = policy_at(np.ones(heads), layer.q.device)
    blocks = -(-layer.q.shape[2] // block_m)
    share = QueryBlocks(min(1.0, most_rows / blocks))
    chosen = torch.as_tensor(spread(blocks, share), device=layer.q.device)
    prefix = None
    if isinstance(low, SequenceLength) and not layer.mask.causal:
        size_q, size_k = (math.ceil(low.fraction * t.shape[2]) for t in (layer.q, layer.k))
        prefix = as_numpy(
            profile(
                layer.q[:, :, :size_q], layer.k[:, :, :size_k], layer.v[:, :, :size_k], policy,
                mask=layer.mask, scale=layer.scale, selector=selector,
                block_m=block_m, block_n=block_n, lambdas=lambdas, compensation=compensation,
                data=layer.data and layer.data.part(slice(size_q), slice(size_k)),
            )
        )  # fmt: skip
    whole = profile(
        layer.q, layer.k, layer.v, policy, mask=layer.mask, scale=layer.scale,
        selector=selector, block_m=block_m, block_n=block_n, rows=chosen,
        lambdas=lambdas, compensation=compensation, data=layer.data,
    )  # fmt: skip
    return ProfileEvaluator(as_numpy(whole), prefix, blocks, lambdas)


def as_numpy(tables: Profile) -> dict[str, np.ndarray]:
    """The tables of a profile on the host."""
    names = ("rows", "error", "computed", "before", "norm", "forced", "visible")
    found = {name: getattr(tables, name) for name in names}
    if tables.error.shape[-1] < 1 << 15:  # half as much to copy and to keep
        found["computed"] = tables.computed.to(torch.int16)
    return {name: table.cpu().numpy() for name, table in found.items()}


@dataclass(frozen=True, slots=True)
class DirectEvaluator:
    """Runs the op on the captured tensors and compares with SDPA."""

    layers: Layers
    site: str
    heads: int
    selector: str
    compensation: str = "none"
    lambdas: tuple[float, ...] = OFF  # how much lambda saves is not counted by the op

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Error and density at u `[H]`; there is one level."""
        layer = self.layers.layer(self.site)
        policy = policy_at(np.asarray(tau_of_u(u)), layer.q.device)
        error = torch.zeros(layer.q.shape[:2], dtype=torch.float64, device=layer.q.device)
        norm, kept, seen = (torch.zeros_like(error) for _ in range(3))
        for part in parts(layer, fidelity):
            ours = self.run(part, policy).double()
            exact = dispatch.dense(
                part.q, part.k, part.v, mask=part.mask, scale=part.scale, data=part.data
            )
            error += (ours - exact.double()).abs().sum((2, 3))
            norm += exact.double().abs().sum((2, 3))
            counts, visible = self.count(part, policy)
            kept += counts
            seen += visible
        relative = torch.where(norm == 0, 0.0, error / norm).amax(0)
        density = kept.sum(0) / seen.sum(0).clamp(min=1)
        return Measured(relative.cpu().numpy(), density.cpu().numpy())

    def density(self, policy: Tensor) -> float:
        """Share of the visible blocks that all heads keep; nothing is attended over."""
        counts, visible = self.count(self.layers.layer(self.site), policy)
        return float((counts.sum(0) / visible.sum(0).clamp(min=1)).mean())

    def run(self, part: Layer, policy: Tensor) -> Tensor:
        """The op on a part of the layer."""
        return dispatch.attention(
            part.q, part.k, part.v, policy, mask=part.mask, scale=part.scale,
            selector=self.selector, compensation=self.compensation, data=part.data,
        )  # fmt: skip

    def count(self, part: Layer, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks kept and visible, both `[B, H]`."""
        block_m, block_n = dispatch.block_sizes(part.q.device.type)
        masked = blocked(
            part.data, part.mask, part.q.shape[2], part.k.shape[2],
            block_m=block_m, block_n=block_n,
        )  # fmt: skip
        counts, _ = select(
            part.q, part.k, policy, mask=part.mask, scale=part.scale, selector=self.selector,
            block_m=block_m, block_n=block_n, masked=masked,
        )  # fmt: skip
        qb = Blocks.of(part.q.shape[2], block_m, part.q.device)
        kb = Blocks.of(part.k.shape[2], block_n, part.q.device)
        visible = head_visible(part.mask, policy, qb, kb)
        if masked is not None:
            visible = visible & masked.some
        visible = visible.expand(*counts.shape[:2], -1, -1)
        return counts.sum(-1), visible.sum((2, 3))


def parts(layer: Layer, fidelity: Fidelity) -> list[Layer]:
    """The pieces of a layer that a fidelity looks at."""
    if fidelity == QueryBlocks(1.0):
        return [layer]
    length = layer.q.shape[2]
    if isinstance(fidelity, SequenceLength):
        size_q, size_k = (math.ceil(fidelity.fraction * t.shape[2]) for t in (layer.q, layer.k))
        q, k, v = layer.q[:, :, :size_q], layer.k[:, :, :size_k], layer.v[:, :, :size_k]
        data = layer.data and layer.data.part(slice(size_q), slice(size_k))
        return [Layer(q, k, v, layer.mask, layer.scale, data)]
    block_m, _ = dispatch.block_sizes(layer.q.device.type)
    starts = spread(-(-length // block_m), fidelity) * block_m
    return [rows_from(layer, int(start), block_m) for start in starts]


def rows_from(layer: Layer, start: int, count: int) -> Layer:
    """A layer of `count` query rows from `start` on, against all keys."""
    mask = Mask(layer.mask.causal, layer.mask.offset + start, layer.mask.window)
    q = layer.q[:, :, start : start + count]
    data = layer.data and layer.data.part(slice(start, start + count), slice(None))
    mask = mask if layer.mask.causal else layer.mask
    return Layer(q, layer.k, layer.v, mask, layer.scale, data)
