"""Make a full-attention model hybrid: `afbs_compile.hybridize(model, inputs, ratio=…)`.

Finds the heads that can live with a sliding window (BOSCH, arXiv 2604.05942) and returns a policy
in which they have one.
"""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from afbs_compile import hybrid_policy
from afbs_compile.ahead import to
from afbs_compile.executors import helpers
from afbs_compile.hybrid_losses import Losses
from afbs_compile.hybrid_objective import FIGURES
from afbs_compile.hybrid_samples import Input, Sample
from afbs_compile.hybrid_subject import Subject, Wishes, subject
from afbs_compile.policy import Policy, Tuning, bucket_of
from afbs_compile.profiling import Clock
from afbs_compile.progress import OnProgress, Progress
from afbs_compile.tuner import bosch
from afbs_compile.tuner.bosch import Found, Search
from afbs_compile.versions import device_name, versions


@dataclass(frozen=True, slots=True)
class Task:
    """What a helper needs to know: the model or how to load it, samples on the CPU, wishes."""

    model: nn.Module | Callable[[], nn.Module]
    samples: Sequence[Sample]
    wishes: Wishes


def hybridize(
    model: nn.Module,
    inputs: Sequence[Input | Sample],
    *,
    ratio: float,
    thresholds: Policy | None = None,
    executor: str | None = None,
    workers: int | None = None,
    loader: Callable[[], nn.Module] | None = None,
    on_progress: OnProgress | None = None,
    **wishes: Any,
) -> Policy:
    """Give the heads that can live with it a sliding window.

    Evaluations are kept in the cache: a search that was interrupted goes on where it stopped and
    finds what it would have found, if model, inputs and options are the same.

    Args:
        model: Any module with logits among its outputs; it runs as it is, under `torch.no_grad`.
        inputs: Calibration: inputs of `model` as for `tune`, or `Sample`s, which also say which
            predictions count. Longer than the window; with tasks that need far context, since the
            loss on plain text hardly shows which heads look far.
        ratio: Share of the KV groups that get a window, met exactly (rounded up to whole groups).
        thresholds: A tuned policy of the same model, for the global heads.
        executor: As in `tune`.
        workers: As in `tune`.
        loader: As in `tune`.
        on_progress: Told how far it is; by default bars on a terminal.
        **wishes: `window` (1024, itself included), `sink` (4 first tokens), `budget` (600
            evaluations), `objective` (`kl` or `task`), `prior` (`curvature`, `fisher`,
            `locality`, `retrieval`, `best` of these, which needs token ids, or `none`), `solver`
            (`lns`, `swaps`, `random`, `nomad`, which needs PyNomadBBO, or a callable), `seed` (0),
            `levels` (windowed groups that a layer may begin with), `seconds` (stop after so
            many), and `cache_dir`.

    Returns:
        A policy for the length bucket of the longest input. Windowed heads hold at every length,
        so the backend takes it for other lengths, too, if `thresholds` was not given.

    Raises:
        ValueError: An option or input is wrong, or the model has no head that can be windowed.
    """
    asked = Wishes(ratio, **wishes)
    samples = [x if isinstance(x, Sample) else Sample(x) for x in inputs]
    if not samples:
        raise ValueError("inputs is empty: give one or more inputs of the model")
    with ExitStack() as stack:
        if on_progress is None:
            on_progress = stack.enter_context(Progress())
        ready = subject(model, samples, asked)
        stack.enter_context(ready.store)
        task = Task(loader or model, cpu(samples) if executor else samples, asked)
        stack.enter_context(helpers(executor, workers, functools.partial(assist, task)))
        found, losses, seconds = searched(ready, asked, on_progress)
    policy = policy_of(ready, asked, found, losses, seconds)
    return hybrid_policy.combined(policy, thresholds) if thresholds else policy


def searched(
    ready: Subject, wishes: Wishes, on_progress: OnProgress
) -> tuple[Found, Losses, float]:
    """Search; what was found, the objective, and how long it took in seconds."""
    losses, clock, begun = ready.losses(wishes), Clock.of(wishes.seconds), time.perf_counter()
    layout = ready.evaluator.layout
    wanted = Search(
        layout, wishes.ratio, wishes.budget, None, wishes.seed, wishes.solver,
        levels=wishes.levels,
    )  # fmt: skip
    losses.anchors()
    if wishes.prior != "none" and 0 < layout.share(wishes.ratio) < layout.size:
        on_progress(0, wishes.budget, "search", f"ranking: {wishes.prior}")
        first, *others = priors = ready.priors(wishes)
        ready.compared(losses, priors, wishes)
        foresight = ready.foresight(wishes, losses)
        wanted = replace(wanted, prior=first, others=others, foresight=foresight)

    def on_best(done: int, budget: int, stage: str, best: float) -> None:
        on_progress(done, budget, "search", f"{stage}, best {best:.4f}")

    losses.clock = clock  # what was asked before is needed for any answer
    with threadpool_limits(1, user_api="blas"):  # the surrogate's matrices are tiny: threads wait
        found = bosch.search(losses, wanted, on_best)
    return found, losses, time.perf_counter() - begun


def policy_of(
    ready: Subject, wishes: Wishes, found: Found, losses: Losses, seconds: float
) -> Policy:
    """What was found, as a document."""
    device = ready.evaluator.device
    figures = losses.figures([found.bits])[0] if np.isfinite(found.loss) else None
    options: dict[str, float | str] = {
        "kind": hybrid_policy.KIND,
        "ratio": wishes.ratio,
        "window": float(wishes.window),
        "sink": float(wishes.sink),
        "budget": float(wishes.budget),
        "objective": wishes.objective,
        "prior": wishes.prior,
        "solver": wishes.solver if isinstance(wishes.solver, str) else "custom",
        "seed": float(wishes.seed),
    }
    tuning = Tuning(
        bucket=bucket_of(ready.length),
        length=ready.length,
        options=options,
        complete=found.complete,
        evaluations=found.evaluations,
        cost_dense_passes=ready.evaluator.dense_passes(),
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(device),
        versions=versions(),
        inputs=tuple(call.sample.task for call in ready.evaluator.calls),
        sites=hybrid_policy.sites_of(
            found.bits, ready.evaluator.sites, window=wishes.window, sink=wishes.sink,
            length=ready.length, device_type=device.type,
        ),
        kl=None if figures is None else float(figures[:, FIGURES.index("kl")].max()),
    )  # fmt: skip
    return Policy(ready.key, ready.name, (tuning,))


def cpu(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with their tensors on the CPU."""
    return [replace(sample, inputs=to("cpu", sample.inputs)) for sample in samples]


def assist(task: Task, n: int) -> None:
    """The n-th helper's work: the same search, whose evaluations are shared."""
    model = task.model if isinstance(task.model, nn.Module) else task.model()
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    samples = [replace(sample, inputs=to(device, sample.inputs)) for sample in task.samples]
    ready = subject(model, samples, task.wishes)
    with ready.store:
        searched(ready, task.wishes, lambda done, total, phase, site: None)
