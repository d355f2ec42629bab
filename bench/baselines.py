"""What is it compared with? Dense SDPA by cuDNN and FlashAttention-2, and FlexAttention.

FlexAttention gets the same block lists, is compiled for the shape, and runs with the fastest of
a few ways of compiling it; FlashAttention-4 is `bench.fa4`.
"""

import functools
import statistics
import sys
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask
from torch.nn.functional import scaled_dot_product_attention

from afbs_compile.bench import harness
from afbs_compile.bench.checks import relative
from afbs_compile.bench.problems import BLOCK_M, BLOCK_N, Lists, Problem, Shape
from afbs_compile.kernels.lists import from_keep, to_keep

SAME = 1e-2  # relative difference up to which a baseline computes the same as we do
TRIALS = 3
Call = Callable[[], Tensor]
Name = TypeVar("Name", bound=Hashable)


class Unavailable(Exception):
    """A baseline that cannot run here, and why."""


@dataclass(slots=True)
class Notes:
    """What was not measured, and why: told at once and kept for the result file."""

    told: list[str] = field(default_factory=list)
    tell: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        """Tell it, once."""
        if text not in self.told:
            self.told.append(text)
            self.tell(text)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def sdpa(problem: Problem) -> Tensor:
    """SDPA on a problem, with whatever backend is chosen around it."""
    q, k, v = problem.q, problem.k, problem.v
    return scaled_dot_product_attention(
        q, k, v, is_causal=problem.shape.causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def dense(problem: Problem, backend: SDPBackend) -> Call:
    """Dense SDPA by one backend."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(problem)

    return call


def cudnn(problem: Problem) -> Call:
    """What every ratio is over."""
    return dense(problem, SDPBackend.CUDNN_ATTENTION)


def fa2(problem: Problem) -> Call:
    """PyTorch's own FlashAttention-2."""
    return dense(problem, SDPBackend.FLASH_ATTENTION)


def tried(name: str, call: Call, notes: Notes, like: Tensor | None = None) -> Call | None:
    """The call if it runs, and computes `like` where that is given; else None and a note."""
    try:
        found = call()
        torch.sum(found[..., :1, :1]).item()  # faults show here
        if like is not None and not (error := relative(found, like)) <= SAME:
            raise Unavailable(f"its result differs by {error:.1e}")
    except Exception as error:
        notes(f"{name} left out: {reason(error)}")
        return None
    return call


def fastest(calls: Mapping[Name, Callable[[], Any]]) -> Name:
    """The name of the call that took least time in a short comparison; there is one at least."""
    names = list(calls)
    if len(names) == 1:
        return names[0]
    times = harness.interleaved({str(i): calls[n] for i, n in enumerate(names)}, TRIALS)
    return min(names, key=lambda name: statistics.median(times[str(names.index(name))]))


def causal_pairs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """FlexAttention's `mask_mod` of a causal call."""
    return j <= i


def full_blocks(problem: Problem, block_n: int = BLOCK_N) -> Tensor:
    """Bool `[NQ, NK]`: blocks in which every pair is visible, so that no mask is evaluated."""
    if not problem.shape.causal:
        return problem.visible(BLOCK_M, block_n)
    n = problem.shape.length
    first = torch.arange(0, n, BLOCK_M, device=problem.q.device)
    last = torch.arange(0, n, block_n, device=problem.q.device) + block_n - 1
    return last <= first[:, None]


def block_mask(problem: Problem, lists: Lists, *, backward: bool = False) -> BlockMask:
    """Our lists as FlexAttention's: partial blocks on the diagonal, all others full."""
    keep, full = to_keep(*lists), full_blocks(problem)
    length = problem.shape.length
    return BlockMask.from_kv_blocks(
        *from_keep(keep & ~full),
        *from_keep(keep & full),
        BLOCK_SIZE=(BLOCK_M, BLOCK_N),
        mask_mod=causal_pairs if problem.shape.causal else noop_mask,
        seq_lengths=(length, length),
        compute_q_blocks=backward,
    )


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compile FlexAttention."""

    mode: str
    tma: bool

    def __str__(self) -> str:
        """As results record it."""
        return f"{self.mode}{', USE_TMA' if self.tma else ''}"

    def compiled(self) -> Callable[..., Tensor]:
        """FlexAttention compiled so; code of its own, as Dynamo counts compilations by code."""
        options: Any = {"USE_TMA": True} if self.tma else None

        def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Any:
            return flex_attention(
                q, k, v, block_mask=block_mask, kernel_options=options,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip

        code = attend.__code__.replace()
        own = types.FunctionType(code, attend.__globals__, "attend", None, attend.__closure__)
        mode = None if self.mode == "default" else self.mode
        return torch.compile(own, mode=mode, dynamic=False, fullgraph=True)


TUNED = "max-autotune-no-cudagraphs"
THOROUGH = (Way(TUNED, True), Way("default", True), Way("default", False))
QUICK = (Way("default", True), Way("default", False))


class Flex:
    """FlexAttention in the way that was fastest where a kind of shape was first seen."""

    def __init__(self, ways: tuple[Way, ...], notes: Notes) -> None:
        """Choose among `ways`, the last of which is a last resort."""
        self.ways = ways
        self.notes = notes
        self.fastest: dict[tuple[int, bool], Way] = {}
        self.shape: Shape | None = None
        self.found: tuple[Callable[..., Tensor], Way] | None = None

    def call(self, problem: Problem, lists: Lists, like: Tensor) -> tuple[Call | None, str | None]:
        """FlexAttention on these lists and how it was compiled; None if it cannot run."""
        mask = block_mask(problem, lists)
        found = self.of_shape(problem, mask)
        if found is None:
            return None, None
        run, way = found
        q, k, v = problem.q, problem.k, problem.v
        call = tried(
            f"FlexAttention {problem.shape}", lambda: run(q, k, v, mask), self.notes, like
        )
        return call, str(way) if call else None

    def of_shape(
        self, problem: Problem, mask: BlockMask
    ) -> tuple[Callable[..., Tensor], Way] | None:
        """The compiled function of a shape; one is kept."""
        if self.shape != problem.shape:
            self.shape, self.found = problem.shape, self.best(problem, mask)
        return self.found

    def best(self, problem: Problem, mask: BlockMask) -> tuple[Callable[..., Tensor], Way] | None:
        """Try the ways that are open for a kind of shape and keep the fastest."""
        kind = (problem.shape.head_dim, problem.shape.causal)
        known = self.fastest.get(kind)
        runs: dict[Way, Callable[..., Tensor]] = {}
        calls: dict[Way, Call] = {}
        for way in (known,) if known else self.ways:
            if way == self.ways[-1] and runs:
                break
            run = way.compiled()
            call = functools.partial(run, problem.q, problem.k, problem.v, mask)
            if tried(f"FlexAttention ({way}) {problem.shape}", call, self.notes):
                runs[way], calls[way] = run, call
        if not runs:
            return None
        way = fastest(calls)
        self.fastest[kind] = way
        return runs[way], way
