"""What do windowed heads do to a model? Its predictions on some calls, against its own dense ones.

A choice of heads (`tuner.heads`) becomes a policy, mode `window` for the query heads of its KV
groups, and the rewritten graph runs under it from the first layer that differs from an earlier run
on. Three numbers a call: KL(dense ‖ hybrid) and the surprise by the right tokens, in nats a
prediction, and the share of questions that are answered right. No number is fetched from the
device before a whole choice is evaluated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import nll_loss

from afbs_compile.damage import logits_of
from afbs_compile.hybrid_samples import Sample, Wanted, wanted
from afbs_compile.passes.rewrite import Site
from afbs_compile.pieces import Pieces
from afbs_compile.policy import Head
from afbs_compile.policy_tensor import rows
from afbs_compile.resume import Resumable
from afbs_compile.tuner.heads import Bits, Layout, text

CHUNK = 512  # rows a softmax in fp32
FIGURES = ("kl", "surprise", "right")
GLOBAL = Head("dense", 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the model as its graph saw it."""

    gm: GraphModule
    args: Sequence[Any]
    sites: Sequence[Site]
    sample: Sample


class Evaluator:
    """Runs choices of windowed heads on some calls.

    Attributes:
        calls: Of one model; their sites are the same.
        layout: One bit a site and KV group.
    """

    def __init__(
        self, calls: Sequence[Call], *, window: int, sink: int, memory_bytes: int
    ) -> None:
        """Prepare; nothing is run yet.

        Args:
            calls: At least one.
            window: Keys that a windowed head sees, itself included.
            sink: Tokens at the start that it sees besides.
            memory_bytes: What may be kept to resume from, in all.
        """
        self.calls, self.memory_bytes = list(calls), memory_bytes
        self.sites = list(calls[0].sites)
        self.layout = Layout(tuple(site.kv_heads for site in self.sites))
        self.device = next(x.device for x in calls[0].args if isinstance(x, Tensor))
        both = rows([GLOBAL, windowed(window, sink)], self.device)
        self.dense_row, self.window_row = both.unbind()
        self.runs: list[Resumable] | None = None
        self.dense: list[tuple[Wanted, Tensor]] = []  # what counts, and its log-probabilities

    def policy(self, bits: Bits) -> Tensor:
        """The policies of all sites `[sites, Hmax, COLUMNS]`."""
        most = max(site.heads for site in self.sites)
        mask = torch.zeros(len(self.sites), most, 1, dtype=torch.bool)
        for n, site in enumerate(self.sites):
            own = torch.from_numpy(bits[self.layout.bits_of(n)])
            mask[n, : site.heads, 0] = own.repeat_interleave(site.heads // site.kv_heads)
        mask = mask.to(self.device, non_blocking=True)
        return torch.where(mask, self.window_row, self.dense_row)

    def outputs(self, bits: Bits, n: int) -> Tensor:
        """Logits `[..., V]` of one call."""
        policy = self.policy(bits)
        if self.runs is None:
            self.runs = self.resumable(policy)
        name = text(bits)
        ends = np.cumsum(self.layout.groups)
        starts = ends - np.array(self.layout.groups)
        keys = [name[a:b] for a, b in zip(starts, ends, strict=True)]
        return logits_of(self.runs[n].run(keys, policy))

    def resumable(self, policy: Tensor) -> list[Resumable]:
        """Every call, ready to run; calls of one graph share its pieces."""
        each = self.memory_bytes // len(self.calls)
        pieces: dict[GraphModule, Pieces] = {}
        for one in self.calls:
            if one.gm not in pieces:
                pieces[one.gm] = Pieces(one.gm, one.sites, policy)
        return [Resumable(pieces[one.gm], one.args, each) for one in self.calls]

    def dense_passes(self) -> float:
        """How many passes of all calls the runs so far amount to, by their layers."""
        ran = sum(run.ran for run in self.runs or [])
        return ran / (len(self.sites) * len(self.calls))

    @torch.no_grad()
    def prepare(self) -> None:
        """Run the model dense, once."""
        none = np.zeros(self.layout.size, dtype=bool)
        for n, call in enumerate(self.calls[len(self.dense) :], len(self.dense)):
            logits = self.outputs(none, n)
            counted = wanted(call.sample, logits, call.args)
            self.dense.append((counted, predictions(logits, counted)))

    @torch.no_grad()
    def __call__(self, bits: Bits) -> Tensor:
        """The figures of every call `[calls, 3]`, on the device, not waited for."""
        self.prepare()
        found = []
        for n, (counted, dense) in enumerate(self.dense):
            ours = predictions(self.outputs(bits, n), counted)
            found.append(figures(dense, ours, counted))
        return torch.stack(found)


def windowed(window: int, sink: int) -> Head:
    """A head that sees a sliding window and the first tokens."""
    return Head("window", 1.0, window=window, sink=sink, neighbours=0)


def predictions(logits: Tensor, counted: Wanted) -> Tensor:
    """Log-probabilities `[R, V]` of what counts, in fp32, a chunk of rows at a time."""
    rows = torch.split(logits.flatten(0, -2)[counted.rows], CHUNK)
    return torch.cat([part.float().log_softmax(-1) for part in rows])


def figures(dense: Tensor, ours: Tensor, counted: Wanted) -> Tensor:
    """KL, surprise and share of right answers `[3]` from log-probabilities `[R, V]`."""
    pairs = zip(torch.split(dense, CHUNK), torch.split(ours, CHUNK), strict=True)
    kl = torch.stack([(p.exp() * (p - q)).sum(dtype=torch.float64) for p, q in pairs]).sum()
    known = counted.targets >= 0
    surprise = nll_loss(ours, counted.targets.clamp(min=0), reduction="none") * known
    wrong = (ours.argmax(-1) != counted.targets) & known
    missed = torch.zeros(counted.questions, device=ours.device)
    missed.index_add_(0, counted.answers, wrong.float())
    asked = torch.zeros_like(missed).index_add_(0, counted.answers, known.float())
    right = ((missed == 0) & (asked > 0)).sum() / (asked > 0).sum().clamp(min=1)
    mean = surprise.sum(dtype=torch.float64) / known.sum().clamp(min=1)
    return torch.stack([kl / len(dense), mean, right.double()])
