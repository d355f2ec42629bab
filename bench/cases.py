"""What is timed, and which rows come of it? One function a case; a row is flat.

Every `ratio_*` is the baseline's time over ours, larger is better for us: the median over
interleaved runs. FlexAttention and FlashAttention-4 get block lists and no selection time, also
where ours includes the selection.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import afbs_compile.kernels.op  # noqa: F401  defines the op
from afbs_compile.bench import baselines, checks, fa4, harness, problems
from afbs_compile.bench.baselines import Call, Flex, Notes
from afbs_compile.bench.problems import BLOCK_M, BLOCK_N, Lists, Problem
from afbs_compile.kernels import on_gpu
from afbs_compile.kernels.lists import from_keep

SELECTORS = ("sub8", "sub4", "mean")
SELECTION_TAU = 0.9
BLOCKS = {"block_m": BLOCK_M, "block_n": BLOCK_N}
Row = dict[str, Any]
EMPTY: Row = dict.fromkeys(
    ("kernel", "selector", "inputs", "granularity", "kept", "tau", "ours_ms", "cudnn_ms",
     "ratio_cudnn", "spread", "ratio_fa2", "ratio_flex", "flex_options", "ratio_fa4",
     "fa4_options", "percent_of_dense", "variant", "host_us")
)  # fmt: skip


@dataclass(slots=True)
class Bench:
    """How thoroughly to measure, and with what."""

    flex: Flex
    notes: Notes
    kept: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    repeats: int = 9
    portable: bool = True  # whether the Triton kernel is timed beside Gluon's


def row(problem: Problem, case: str, **found: Any) -> Row:
    """A row: the shape, every column, and what was found."""
    shape = problem.shape
    common = {
        "case": case, "head_dim": shape.head_dim, "length": shape.length, "causal": shape.causal,
        "heads": problem.heads, "kv_heads": int(problem.k.shape[1]), "batch": 1,
        "dtype": str(problem.q.dtype).removeprefix("torch."), "inputs": problem.kind,
    }  # fmt: skip
    return EMPTY | common | found


def timed(problem: Problem, case: str, times: dict[str, list[float]], **found: Any) -> Row:
    """A row of interleaved times: `ours`, and whichever baselines ran."""
    ours = times["ours"]
    ratios = {name: harness.ratio(runs, ours) for name, runs in times.items()}
    over = {f"ratio_{name}": ratios[name][0] for name in times if name != "ours"}
    cudnn = times.get("cudnn")
    return row(
        problem, case, **found, **over,
        ours_ms=statistics.median(ours),
        cudnn_ms=statistics.median(cudnn) if cudnn else None,
        spread=ratios["cudnn"][1] if cudnn else None,
    )  # fmt: skip


def present(calls: dict[str, Callable[[], Any] | None]) -> dict[str, Callable[[], Any]]:
    """The calls that can run."""
    return {name: call for name, call in calls.items() if call}


def dense(bench: Bench, problem: Problem) -> dict[str, Call | None]:
    """The dense baselines that run here."""
    makes = {"cudnn": baselines.cudnn, "fa2": baselines.fa2}
    return {
        name: baselines.tried(f"{name} {problem.shape}", make(problem), bench.notes)
        for name, make in makes.items()
    }


def kernel_of(run: Callable[..., Any]) -> str:
    """`gluon` or `triton`, for the record."""
    return "gluon" if "gluon" in run.__module__ else "triton"


def attend(problem: Problem, lists: Lists, run: Callable[..., Any]) -> Call:
    """Our attention over lists."""
    everything = problems.policy(1.0, problem.heads, problem.q.device)
    given = (problem.q, problem.k, problem.v, *lists, everything)
    site = {"mask": problem.mask, "scale": problem.scale} | BLOCKS

    def call() -> Tensor:
        o: Tensor = run(*given, **site)[0]
        return o

    return call


def right(problem: Problem, case: str, lists: Lists, call: Call) -> Call:
    """The call, if its result is fp32's within rounding."""
    error = checks.forward_error(problem, lists, call())
    checks.require(f"{case} {problem.shape}", error, checks.FORWARD_BAR)
    return call


def forward(bench: Bench, problem: Problem) -> list[Row]:
    """Attention over given lists: random blocks of 128 x 64 and the diagonal."""
    chosen = on_gpu.gpu_forward(problem.q, problem.k, problem.v, **BLOCKS)
    base = dense(bench, problem)
    rows = []
    for kept in bench.kept:
        lists = from_keep(problems.random_keep(problem, kept))
        ours = right(problem, "forward", lists, attend(problem, lists, chosen))
        flex, options = bench.flex.call(problem, lists, ours())
        calls = present({"ours": ours, **base, "flex": flex})
        found = {"granularity": "128x64", "kept": problems.share(problem, lists[0]),
                 "flex_options": options}  # fmt: skip
        if bench.portable and kernel_of(chosen) == "gluon":
            calls["portable"] = portable(problem, lists)
        times = harness.interleaved(calls, bench.repeats)
        if slow := times.pop("portable", None):
            both = times | {"ours": slow}
            rows.append(timed(problem, "forward", both, kernel="triton", **found))
        rows.append(timed(problem, "forward", times, kernel=kernel_of(chosen), **found))
    return rows


def portable(problem: Problem, lists: Lists) -> Call:
    """The kernel of every other GPU."""
    from afbs_compile.kernels import triton_forward

    call = attend(problem, lists, triton_forward.forward)
    return right(problem, "forward, Triton", lists, call)


def forward_coarse(bench: Bench, problem: Problem) -> list[Row]:
    """The same with blocks of 128 x 128, which FlashAttention-4 can read as well."""
    chosen = on_gpu.gpu_forward(problem.q, problem.k, problem.v, **BLOCKS)
    base = dense(bench, problem)
    rows: list[Row] = []
    for kept in bench.kept:
        keep = problems.random_keep(problem, kept, fa4.BLOCK)
        lists = from_keep(problems.halved(problem, keep))
        ours = right(problem, "forward", lists, attend(problem, lists, chosen))
        other, options = fa4.call(problem, keep, bench.notes, ours())
        if other is None:
            return rows  # nothing that `forward` does not tell
        calls = present({"ours": ours, **base, "fa4": other})
        times = harness.interleaved(calls, bench.repeats)
        rows.append(
            timed(problem, "forward", times, kernel=kernel_of(chosen), granularity="128x128",
                  kept=problems.share(problem, lists[0]), fa4_options=options)
        )  # fmt: skip
    return rows


def selection(bench: Bench, problem: Problem) -> list[Row]:
    """Which blocks? Every selector, against cuDNN's dense attention without a mask."""
    full = dataclasses.replace(problem, shape=dataclasses.replace(problem.shape, causal=False))
    cudnn = baselines.tried(f"cudnn {full.shape}", baselines.cudnn(full), bench.notes)
    policy = problems.policy(SELECTION_TAU, problem.heads, problem.q.device)
    rows = []
    for selector in SELECTORS:
        ours = functools.partial(problems.selected, problem, policy, selector)
        calls = present({"ours": ours, "cudnn": cudnn})
        times = harness.interleaved(calls, bench.repeats)
        found = timed(
            problem, "selection", times, kernel="triton", selector=selector, tau=SELECTION_TAU,
            kept=problems.share(problem, ours()[0]),
        )  # fmt: skip
        over = found["ratio_cudnn"]
        rows.append(found | {"percent_of_dense": 100 / over if over else None})
    return rows


def whole_op(bench: Bench, problem: Problem) -> list[Row]:
    """Selection and attention, as a model runs them, at the tau that keeps about so much."""
    chosen = on_gpu.gpu_forward(problem.q, problem.k, problem.v, **BLOCKS)
    base = dense(bench, problem)
    rows = []
    for kept in bench.kept:
        tau, lists = problems.tau_for(problem, kept)
        ours = right(problem, "whole_op", lists, whole(problem, tau))
        flex, options = bench.flex.call(problem, lists, ours())
        times = harness.interleaved(present({"ours": ours, **base, "flex": flex}), bench.repeats)
        rows.append(
            timed(problem, "whole_op", times, kernel=kernel_of(chosen), selector="sub8", tau=tau,
                  kept=problems.share(problem, lists[0]), flex_options=options)
        )  # fmt: skip
    return rows


def whole(problem: Problem, tau: float) -> Call:
    """The op as graphs call it, without gradients."""
    mask = problem.mask
    call: Call = functools.partial(
        torch.ops.afbs.attention.default, problem.q, problem.k, problem.v,
        problems.policy(tau, problem.heads, problem.q.device),
        mask.causal, mask.offset, mask.window, problem.scale, "sub8", 0,
    )  # fmt: skip
    return call  # no input needs a gradient


def host(bench: Bench, problem: Problem) -> list[Row]:
    """What a call costs the host, in Python and in launches."""
    chosen = on_gpu.gpu_forward(problem.q, problem.k, problem.v, **BLOCKS)
    tau, lists = problems.tau_for(problem, 0.25)
    policy = problems.policy(tau, problem.heads, problem.q.device)
    calls: dict[str, Callable[[], Any]] = {
        "forward": attend(problem, lists, chosen),
        "selection": functools.partial(problems.selected, problem, policy, "sub8"),
        "whole_op": whole(problem, tau),
    }
    rows = [
        row(problem, "host", variant=name, kernel=kernel_of(chosen), host_us=harness.host_us(call))
        for name, call in calls.items()
    ]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        name, call = f"cudnn {problem.shape}", functools.partial(baselines.sdpa, problem)
        if baselines.tried(name, call, bench.notes):
            rows.append(row(problem, "host", variant="cudnn", host_us=harness.host_us(call)))
    return rows
