"""What can the search ask? Evaluators of every site on every input, and what a call takes."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from afbs_compile.capture import Layer, Stream
from afbs_compile.evaluators import DirectEvaluator
from afbs_compile.options import Options
from afbs_compile.problem import Problem, cuda_devices, digests, untraced
from afbs_compile.profiling import POLL_SECONDS, Clock, Walk, job, kind_of
from afbs_compile.progress import OnProgress
from afbs_compile.remembered import Budget, Remembered
from afbs_compile.store import About, Arrays, Store
from afbs_compile.timing import Speed
from afbs_compile.tuner.objective import (
    Evaluator,
    Fidelity,
    QueryBlocks,
    SequenceLength,
    lambdas_of,
    profile_cost_of,
    weights_of,
)
from afbs_compile.tuner.objective import measure as measure_at

LOGGER = logging.getLogger(__name__)

Measure = Callable[[Layer, str, str], Speed]

LOW: dict[str, Fidelity] = {
    "query-blocks": QueryBlocks(1 / 8),
    "sequence-length": SequenceLength(1 / 4),
}


@dataclass(frozen=True, slots=True)
class Measurements:
    """What the search can ask: for every set of inputs the evaluators by site, and the speeds.

    `stopped` says why sites are missing, or is None.
    """

    tables: list[dict[str, Evaluator]]
    speeds: dict[str, Speed]
    stopped: str | None


def measurements(
    problem: Problem, store: Store, on_progress: OnProgress, measure: Measure
) -> Measurements:
    """Profile every site, or make evaluators that run the kernel; time a layer of every kind."""
    streams = [Stream(problem.gm, inputs, problem.sites) for inputs in problem.inputs]
    clock = Clock.of(problem.options.tuning_budget_s)
    if problem.options.evaluator == "direct":
        tables = direct(problem, streams, store, clock)
        kinds = {s.name: kind_of(streams[0].layer(s.name)) for s in problem.sites}
        return Measurements(tables, speeds(problem, store, streams[0], kinds, measure), None)
    walk = walk_of(problem, streams, store, clock, on_progress)
    walk.run()
    kinds = {site.name: walk.found[site.name, 0].kind for site in walk.complete()}
    timed = speeds(problem, store, streams[0], kinds, measure)
    return Measurements(walk.tables(), timed, walk.stopped)


def walk_of(
    problem: Problem,
    streams: Sequence[Stream],
    store: Store,
    clock: Clock,
    on_progress: OnProgress,
) -> Walk:
    """A walk over the sites of a problem."""
    return Walk(
        problem.sites, streams, digests(problem), store, problem.options.selector,
        problem.options.compensation, LOW[problem.options.fidelity], clock, on_progress,
        interrupted=problem.interrupted,
    )  # fmt: skip


def help_out(problem: Problem, store: Store) -> None:
    """Profile sites that nobody else does, for the process that asked for the tuning."""
    with torch.random.fork_rng(cuda_devices(problem.inputs)), torch.no_grad(), untraced():
        streams = [Stream(problem.gm, inputs, problem.sites) for inputs in problem.inputs]
        clock = Clock.of(problem.options.tuning_budget_s)
        walk = walk_of(problem, streams, store, clock, lambda done, total, phase, site: None)
        walk.keep = False
        walk.run()


def run_along(problem: Problem, store: Store, on_progress: OnProgress) -> Any:
    """The graph's output on its one set of inputs, every site profiled on the way.

    What it measures is found in the store by the tuning that follows, which needs no pass then.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what was measured is kept.
    """
    stream = Stream(problem.gm, problem.inputs[0], problem.sites, own_run=True)
    walk = walk_of(problem, [stream], store, Clock(None), on_progress)
    walk.keep = False
    try:
        with untraced():
            walk.run()
    except (ValueError, torch.OutOfMemoryError) as error:  # the tuning meets it again, and says so
        LOGGER.info("not profiled while the model ran: %s", error)
    if walk.stopped:
        raise KeyboardInterrupt
    return stream.finish()


def begun(problem: Problem, store: Store) -> bool:
    """Has anything been measured on these very inputs?"""
    inputs = digests(problem)
    if problem.options.evaluator == "direct":
        return any(store.has(asked(one)) for one in inputs)
    return any(store.has(job(site, one)) for site in problem.sites for one in inputs)


def asked(digest: str) -> About:
    """The note that evaluators were asked about an input."""
    return {"asked": digest}


def direct(
    problem: Problem, streams: Sequence[Stream], store: Store, clock: Clock
) -> list[dict[str, Evaluator]]:
    """For every set of inputs, evaluators that run the kernel and remember what they measured."""
    budget, inputs = Budget(clock), digests(problem)
    rule = problem.options.selector, problem.options.compensation
    for one in inputs:
        store.save(asked(one), {}, {})
    return [
        {
            site.name: Remembered(
                DirectEvaluator(stream, site.name, site.heads, *rule),
                store,
                job(site, digest),
                budget,
            )
            for site in problem.sites
        }
        for stream, digest in zip(streams, inputs, strict=True)
    ]


def speeds(
    problem: Problem, store: Store, stream: Stream, kinds: Mapping[str, str], measure: Measure
) -> dict[str, Speed]:
    """The speed of every site in `kinds`; one layer of every kind is timed, by one worker.

    Timed when no worker profiles any more: they would slow each other's clock down.
    """
    known: dict[str, Speed] = {}
    for name, kind in kinds.items():
        if kind not in known:
            timed = partial(time_layer, stream, name, problem.options, measure)
            while (found := store.once({"speed": kind}, timed)) is None:
                time.sleep(POLL_SECONDS)
            known[kind] = Speed(**found[0])
    return {name: known[kind] for name, kind in kinds.items()}


def time_layer(
    stream: Stream, name: str, options: Options, measure: Measure
) -> tuple[About, Arrays]:
    """Time the layer of a site."""
    return dataclasses.asdict(
        measure(stream.layer(name), options.selector, options.compensation)
    ), {}


@dataclass(frozen=True, slots=True)
class Worst:
    """Several inputs as one evaluator: the worst error, the mean density."""

    evaluators: Sequence[Evaluator]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.evaluators[0].heads

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Levels of lambda."""
        return lambdas_of(self.evaluators[0])

    @property
    def profile_cost(self) -> float | None:
        """Dense passes of the profiles, for one input."""
        return profile_cost_of(self.evaluators[0])

    @property
    def weights(self) -> Any:
        """What a unit of each head's error counts `[H]`: the mean over the inputs."""
        return np.mean([weights_of(evaluate) for evaluate in self.evaluators], axis=0)

    def __call__(self, u: Any, fidelity: Fidelity, level: Any = None) -> Any:
        """Measure on every input."""
        found = [measure_at(evaluate, u, fidelity, level) for evaluate in self.evaluators]
        error = np.max([m.error for m in found], axis=0)
        return type(found[0])(error, np.mean([m.density for m in found], axis=0))
