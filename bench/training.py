"""The cases with a gradient: `backward` over given lists, and a whole step of the op.

Our backward includes the transposition of the lists; FlexAttention's block mask is transposed
before its clock starts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afbs_compile.bench import baselines, checks, harness, problems
from afbs_compile.bench.baselines import Call, Way, block_mask, tried
from afbs_compile.bench.cases import BLOCKS, Bench, Row, kernel_of, present, timed
from afbs_compile.bench.problems import Lists, Problem
from afbs_compile.kernels import dispatch, on_gpu
from afbs_compile.kernels.lists import from_keep

PLAIN = Way("default", False)  # autotuning a backward takes minutes
Gradients = tuple[Tensor, Tensor, Tensor]


def our_backward(bench: Bench) -> Callable[..., Gradients] | None:
    """The kernels' backward, or None and a note where they have none."""
    found: Callable[..., Gradients] | None = getattr(dispatch, "backward", None)
    if found is None:
        bench.notes("backward and forward_backward left out: these kernels have no backward")
    return found


def leaves(problem: Problem) -> Problem:
    """The problem with tensors that need gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    return Problem(problem.shape, problem.kind, q, k, v)


def upstream(problem: Problem) -> Tensor:
    """A gradient of the output, laid out as the output is."""
    generator = torch.Generator(problem.q.device).manual_seed(3)
    q = problem.q.transpose(1, 2)
    do = torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)
    return do.transpose(1, 2)


def again(run: Callable[[], Tensor], problem: Problem, do: Tensor) -> Call:
    """The backward alone of a forward that has run once: dq."""
    o = run()
    return lambda: torch.autograd.grad(
        o, (problem.q, problem.k, problem.v), do, retain_graph=True
    )[0]  # fmt: skip


def step(run: Callable[[], Tensor], problem: Problem, do: Tensor) -> Call:
    """Forward and backward: dq."""
    return lambda: torch.autograd.grad(run(), (problem.q, problem.k, problem.v), do)[0]


def others(
    bench: Bench, problem: Problem, do: Tensor, kind: Callable[..., Call]
) -> dict[str, Call | None]:
    """The dense baselines, by `again` or `step`."""
    calls: dict[str, Call | None] = {}
    for name, make in (("cudnn", baselines.cudnn), ("fa2", baselines.fa2)):
        try:
            call = kind(make(problem), problem, do)
        except RuntimeError as error:
            bench.notes(f"{name} {problem.shape} left out: {baselines.reason(error)}")
            continue
        calls[name] = tried(f"{name} {problem.shape}", call, bench.notes)
    return calls


def flex(
    bench: Bench, problem: Problem, lists: Lists, do: Tensor, kind: Callable[..., Call],
    run: Callable[..., Tensor], like: Tensor,
) -> Call | None:  # fmt: skip
    """FlexAttention on the same lists, by `again` or `step`."""
    name = f"FlexAttention's backward {problem.shape}"
    try:
        mask = block_mask(problem, lists, backward=True)
        call = kind(lambda: run(problem.q, problem.k, problem.v, mask), problem, do)
    except Exception as error:
        bench.notes(f"{name} left out: {baselines.reason(error)}")
        return None
    return tried(name, call, bench.notes, like)


def way_of(times: dict[str, list[float]]) -> str | None:
    """How FlexAttention was compiled, if it ran."""
    return str(PLAIN) if "flex" in times else None


def gradient_kernel(problem: Problem) -> str:
    """`gluon` or `triton`, for the record."""
    blocks: dict[str, Any] = {**BLOCKS}
    tensors = problem.q, problem.k, problem.v
    return kernel_of(on_gpu.gpu_backward(*tensors, scale=problem.scale, **blocks))


def ours_on(
    problem: Problem, do: Tensor, differentiate: Callable[..., Gradients]
) -> tuple[Callable[..., Any], Callable[..., Gradients]]:
    """Our forward `(lists) -> (o, lse)` and our backward `(lists, o, lse) -> gradients`."""
    run = on_gpu.gpu_forward(problem.q, problem.k, problem.v, **BLOCKS)
    everything = problems.policy(1.0, problem.heads, problem.q.device)
    tensors = (problem.q, problem.k, problem.v)
    site: dict[str, Any] = {"mask": problem.mask, "scale": problem.scale}

    def forward(lists: Lists) -> Any:
        return run(*tensors, *lists, everything, **site, **BLOCKS)

    def backward(lists: Lists, o: Tensor, lse: Tensor) -> Gradients:
        return differentiate(do, *tensors, o, lse, *lists, everything, **site)

    return forward, backward


def backward(bench: Bench, problem: Problem) -> list[Row]:
    """The gradients of q, k and v over given lists."""
    kernels = our_backward(bench)
    if kernels is None:
        return []
    do, graph, run = upstream(problem), leaves(problem), PLAIN.compiled()
    forward, differentiate = ours_on(problem, do, kernels)
    base = others(bench, graph, do, again)
    rows = []
    for kept in bench.kept:
        lists = from_keep(problems.random_keep(problem, kept))
        o, lse = forward(lists)
        found = differentiate(lists, o, lse)
        error = checks.backward_error(problem, lists, do, found)
        checks.require(f"backward {problem.shape}", error, checks.BACKWARD_BAR)
        calls = {
            "ours": lambda lists=lists, o=o, lse=lse: differentiate(lists, o, lse),
            **base,
            "flex": flex(bench, graph, lists, do, again, run, found[0]),
        }
        times = harness.interleaved(present(calls), bench.repeats)
        rows.append(
            timed(problem, "backward", times, granularity="128x64", flex_options=way_of(times),
                  kernel=gradient_kernel(problem),
                  kept=problems.share(problem, lists[0]))
        )  # fmt: skip
    return rows


def forward_backward(bench: Bench, problem: Problem) -> list[Row]:
    """Selection, attention and its gradients."""
    kernels = our_backward(bench)
    if kernels is None:
        return []
    do, graph, run = upstream(problem), leaves(problem), PLAIN.compiled()
    forward, differentiate = ours_on(problem, do, kernels)
    base = others(bench, graph, do, step)
    rows = []
    for kept in bench.kept:
        tau, lists = problems.tau_for(problem, kept)

        def ours(tau: float = tau) -> Gradients:
            chosen = problems.select(problem, tau)
            return differentiate(chosen, *forward(chosen))

        calls = {
            "ours": ours,
            **base,
            "flex": flex(bench, graph, lists, do, step, run, ours()[0]),
        }
        times = harness.interleaved(present(calls), bench.repeats)
        rows.append(
            timed(problem, "forward_backward", times, selector="sub8", tau=tau,
                  flex_options=way_of(times), kept=problems.share(problem, lists[0]))
        )  # fmt: skip
    return rows
