"""What does sparsity do to the model's output? Measured end to end, on whole runs of the graph.

Runs Dynamo's graph dense and rewritten, eagerly, and compares the logits: the Kullback-Leibler
divergence of the sparse from the dense prediction, in nats a token, and the increase of perplexity
on the call's own tokens. Of several inputs the worst one counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from afbs_compile.capture import private
from afbs_compile.passes.rewrite import Site, rewrite
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.policy_tensor import stacked

POSITIONS = 2048  # at most, evenly spread: dense logits of them are kept
CHUNK = 512  # positions a softmax in fp32


class Unmeasurable(ValueError):
    """The graph's inputs or outputs do not show what is to be limited."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Worst over the inputs.

    Attributes:
        kl: KL(dense ‖ sparse), nats a token, mean over the positions.
        perplexity_increase: Perplexity sparse over dense, minus 1; None if it was not asked for.
    """

    kl: float
    perplexity_increase: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows; None allows anything.

    Attributes:
        kl: Largest `Damage.kl`.
        perplexity_increase: Largest `Damage.perplexity_increase`.
    """

    kl: float | None
    perplexity_increase: float | None

    def share(self, damage: Damage) -> float:
        """How much of the limits is used up, ≥ 0: all of them hold iff it is ≤ 1."""
        shares = [0.0]
        if self.kl is not None:
            shares.append(damage.kl / self.kl)
        if self.perplexity_increase is not None:
            assert damage.perplexity_increase is not None
            shares.append(damage.perplexity_increase / self.perplexity_increase)
        return max(shares)


class Judge:
    """Measures the damage of policies for one graph on some inputs."""

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Sequence[Any]],
        sites: Sequence[Site],
        *,
        selector: str,
        perplexity: bool,
        compensation: str = "none",
    ) -> None:
        """Run the graph dense on all inputs and keep what the comparison needs.

        Args:
            gm: Dynamo's graph.
            inputs: Real inputs, one sequence a run.
            sites: The sites that a policy makes sparse.
            selector: The block selector of every site.
            perplexity: Whether the inputs hold the tokens that the outputs predict.
            compensation: What stands for dropped blocks at every site.

        Raises:
            Unmeasurable: No output looks like logits, or no input like their tokens.
        """
        self.gm, self.inputs, self.sites = gm, inputs, list(sites)
        self.selector, self.compensation = selector, compensation
        with torch.no_grad():
            self.dense = [reading(gm(*private(gm, args)), args, perplexity) for args in inputs]

    @torch.no_grad()
    def __call__(self, policies: Mapping[str, SitePolicy]) -> Damage:
        """The damage that policies do, by site name; sites without one stay dense."""
        tensor = stacked([(site.name, site.heads) for site in self.sites], policies)
        found = []
        for args, dense in zip(self.inputs, self.dense, strict=True):
            policy = tensor.to(dense.logits.device)
            sparse = rewrite(
                self.gm, self.sites, policy, selector=self.selector, min_length=0,
                compensation=self.compensation,
            )  # fmt: skip
            found.append(compare(dense, logits_of(sparse(*private(self.gm, args), policy))))
        increases = [d.perplexity_increase for d in found if d.perplexity_increase is not None]
        return Damage(max(d.kl for d in found), max(increases, default=None))


@dataclass(frozen=True, slots=True)
class Reading:
    """What is kept of a dense run.

    Attributes:
        positions: Which rows of all logits `[N, V]` are kept.
        logits: Those rows.
        targets: The token that each of the N rows predicts; −1 where there is none. None if
            perplexity was not asked for.
        surprise: Mean cross entropy over the rows with a target, nats.
    """

    positions: Tensor
    logits: Tensor
    targets: Tensor | None
    surprise: float


def reading(outputs: Any, inputs: Sequence[Any], perplexity: bool) -> Reading:
    """What to keep of a dense run."""
    logits = logits_of(outputs)
    targets = next_tokens(logits, inputs) if perplexity else None
    rows = logits.flatten(0, -2)
    count = min(len(rows), POSITIONS)
    positions = ((torch.arange(count) + 0.5) * len(rows) / count).long().to(rows.device)
    surprise = mean_surprise(rows, targets) if targets is not None else 0.0
    return Reading(positions, rows[positions].clone(), targets, surprise)


def compare(dense: Reading, logits: Tensor) -> Damage:
    """The damage of a sparse run's logits."""
    rows = logits.flatten(0, -2)
    kl = divergence(dense.logits, rows[dense.positions])
    if dense.targets is None:
        return Damage(kl, None)
    increase = math.expm1(mean_surprise(rows, dense.targets) - dense.surprise)
    return Damage(kl, increase if math.isfinite(increase) else math.inf)


def logits_of(outputs: Any) -> Tensor:
    """The output of the largest last axis: a vocabulary is wider than a head.

    Raises:
        Unmeasurable: No output is a floating-point tensor of two axes or more.
    """
    tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    wide = [x for x in tensors if x.dim() > 1 and x.is_floating_point() and x.shape[-1] > 1]
    if not wide:
        raise Unmeasurable("the graph returns no logits to compare: tune with max_error instead")
    return max(wide, key=lambda x: x.shape[-1])


def next_tokens(logits: Tensor, inputs: Sequence[Any]) -> Tensor:
    """The token after each position, flat, −1 after the last one of a row.

    Raises:
        Unmeasurable: No input holds token ids for these logits.
    """
    for x in inputs:
        if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32):
            fits = x.dim() > 1 and x.shape == logits.shape[:-1] and x.shape[-1] > 1
            if fits and int(x.min()) >= 0 and int(x.max()) < logits.shape[-1]:
                last = torch.full_like(x[..., :1], -1)
                return torch.cat([x[..., 1:], last], -1).flatten().long()
    raise Unmeasurable(
        f"perplexity needs token ids of shape {list(logits.shape[:-1])} among the inputs: call "
        "the model with input_ids, or set max_kl instead"
    )


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """Mean KL(dense ‖ sparse) over the rows of two `[N, V]` logits, nats; inf if not finite."""
    total = 0.0
    for p, q in zip(torch.split(dense, CHUNK), torch.split(sparse, CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    kl = total / max(1, len(dense))
    return max(0.0, kl) if math.isfinite(kl) else math.inf  # rounding may go below 0


def mean_surprise(rows: Tensor, targets: Tensor) -> float:
    """Mean cross entropy of logits `[N, V]` over the rows that have a target, nats."""
    total = 0.0
    for part, at in zip(torch.split(rows, CHUNK), torch.split(targets, CHUNK), strict=True):
        loss = cross_entropy(part.float(), at, ignore_index=-1, reduction="sum")
        total += float(loss.double())
    return total / int((targets >= 0).sum())
