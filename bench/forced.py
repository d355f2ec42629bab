"""What does the backend make of a model under thresholds that nobody tuned?

Everything between Dynamo and the kernels is the backend's own; only the measuring is left out, and
with `inner="eager"` Inductor: graphs then run as they were rewritten, on the compiled kernels.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import BlockMask

import afbs_compile
from afbs_compile import backend, calibrate, source
from afbs_compile.kernels import dispatch, flex, fused, pairs, reference
from afbs_compile.kernels.data_mask import MaskedBlocks
from afbs_compile.kernels.lists import to_keep
from afbs_compile.options import Options
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head, Policy, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem
from afbs_compile.report import JOURNAL
from afbs_compile.timing import Speed
from afbs_compile.tuner.trace import Trace

Heads = Callable[[Site], tuple[Head, ...]]
GAIN = Speed(dense=1.0, fixed=0.0, per_density=0.5)  # tiny layers gain nothing; say they do


def every(tau: float) -> Heads:
    """The same threshold for all heads."""
    return lambda site: (Head("sparse", tau),) * site.heads


@dataclass(slots=True)
class Forced:
    """Thresholds of all models, and what the backend was asked.

    Attributes:
        heads: What the heads of a site do; None tunes.
        cache_dir: A folder that was empty.
        problems: By model key, what would have been tuned.
        graphs: How many were compiled.
    """

    heads: Heads | None
    cache_dir: str
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    graphs: int = 0

    def move(self, heads: Heads) -> None:
        """Give running models other thresholds; nothing is compiled again."""
        self.heads = heads
        for key, problems in self.problems.items():
            policy = Policy(key, None)
            for problem in problems:
                made = fixed(problem, heads)
                known = policy.find(made.bucket, made.options)
                sites = known.sites | made.sites if known else made.sites
                policy = policy.with_tuning(replace(made, sites=sites))
            afbs_compile.use_policy(policy)


def fixed(problem: Problem, heads: Heads) -> Tuning:
    """A tuning that nobody measured."""
    sites = {
        site.name: SitePolicy(
            name=site.name,
            heads=heads(site),
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            mask=calibrate.describe(site),
            decision="sparse",
        )
        for site in problem.sites
    }
    return calibrate.tuning(problem, sites, Trace(), 0.0)


@contextmanager
def forced(heads: Heads | None, inner: str = "eager") -> Iterator[Forced]:
    """Let the backend take these heads for every site (None: let it tune) in an empty cache."""
    measure_now, inductor = source.measure_now, backend.inductor

    def decide(problem: Problem, key: str, stored: Policy | None, **more: Any) -> Tuning:
        force.problems.setdefault(key, []).append(problem)
        if force.heads is None:
            return measure_now(problem, key, stored, **more)
        return fixed(problem, force.heads)

    def compiled(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
        force.graphs += 1
        return gm.forward if inner != "inductor" else inductor(gm, inputs, options)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(source, "measure_now", decide),
        patch.object(backend, "inductor", compiled),
        patch.object(calibrate, "measure", lambda *_: GAIN),
    ):
        force = Forced(heads, folder)
        JOURNAL.clear()
        yield force


@contextmanager
def interpreted() -> Iterator[None]:
    """Let the kernels of a CPU run uncompiled: as exact, and much sooner for a tiny call."""
    compiled = fused.fused
    kernels = [m for n, m in sys.modules.items() if n.startswith("afbs_compile.kernels.")]
    with ExitStack() as stack:
        for module in kernels:
            if getattr(module, "fused", None) is compiled:
                stack.enter_context(patch.object(module, "fused", lambda function, kind: function))
        stack.enter_context(patch.object(flex, "flex_attention", listed))
        yield


def listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask,
    scale: float,
    enable_gqa: bool,
    score_mod: None = None,
) -> Tensor:
    """FlexAttention in plain torch, by its block lists: its own uncompiled form ignores them."""
    m, n = block_mask.BLOCK_SIZE
    batch, heads = torch.arange(q.shape[0]), torch.arange(q.shape[1])
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    visible = block_mask.mask_mod(
        batch[:, None, None, None], heads[:, None, None], i[:, None], j[None]
    )
    assert block_mask.full_kv_num_blocks is not None
    assert block_mask.full_kv_indices is not None
    partial, full = (
        to_keep(counts, indices)[:, :, i // m][..., j // n]
        for counts, indices in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        )
    )
    seen = (partial & visible) | full
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (k, v))
    scores = (q.float() @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).to(q.dtype)


@contextmanager
def oracle() -> Iterator[None]:
    """Let attention over block lists run in plain torch instead of in a compiled kernel."""

    def forward(
        *tensors: Tensor, beside: None = None, masked: MaskedBlocks | None = None, **settings: Any
    ) -> Tensor:
        data = masked.data if masked else None
        return reference.forward(*tensors, data=data, **settings)[0]

    def biased(*tensors: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        return reference.forward(*tensors, **settings)

    with (
        patch.object(flex, "forward", forward),
        patch.object(pairs, "forward", biased),
        patch.object(dispatch, "fused_scores", lambda *_: None),
    ):
        yield


@contextmanager
def compared() -> Iterator[list[float]]:
    """How far every call of the op is from the oracle on the same inputs.

    Call by call: whole models differ by more where rounding in one layer makes a block of equal
    score change places with another in the next.
    """
    found: list[float] = []
    run = dispatch.attention

    def both(*tensors: Tensor, **settings: Any) -> Tensor:
        out = run(*tensors, **settings)
        with oracle():
            found.append(distance(out, run(*tensors, **settings)))
        return out

    with patch.object(dispatch, "attention", both):
        yield found


def counting(found: list[GraphModule]) -> Callable[..., Any]:
    """A Dynamo backend that runs graphs as they are and keeps them in `found`."""

    def take(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        found.append(gm)
        return gm.forward

    return take


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; infinite where only one is no number."""
    found, wanted = found.detach().double(), wanted.detach().double()
    if found.shape != wanted.shape or not torch.equal(found.isnan(), wanted.isnan()):
        return float("inf")
    most = wanted.nan_to_num().abs().max().clamp(min=1e-30)
    return float((found - wanted).nan_to_num().abs().max() / most)
