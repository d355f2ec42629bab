"""Tune ahead of time: `afbs_compile.tune(model, inputs)` instead of the first compiled call.

Takes several inputs; with two or more the last is held out and thresholds back off until the error
bound holds on it too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from afbs_compile import aliases, cache
from afbs_compile.backend import standing_reason
from afbs_compile.executors import helpers
from afbs_compile.inputs import Shapes, weight_names
from afbs_compile.logs import warn
from afbs_compile.measurements import help_out, run_along
from afbs_compile.options import Options, parse
from afbs_compile.passes.plan import Plan, plan
from afbs_compile.policy import Policy, bucket_of
from afbs_compile.problem import Problem, store_of
from afbs_compile.progress import Progress
from afbs_compile.source import measure_now
from afbs_compile.weights import Layer, new_layer

Input = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(slots=True)
class Recorded:
    """One graph and the arguments of every call of it.

    Attributes:
        gm: Dynamo's graph.
        layer: Whose weights it has.
        found: What can be rewritten in it.
        shapes: Where a call's length is read.
        options: The user's wishes.
        measuring: Whether calls are profiled as they run.
        calls: Their arguments.
        spent_s: Seconds that profiling took, by call, the model's own run included.
    """

    gm: GraphModule
    layer: Layer
    found: Plan
    shapes: Shapes
    options: Options
    measuring: bool = False
    calls: list[list[Any]] = field(default_factory=list)
    spent_s: list[float] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        """Run as it was, and remember the arguments."""
        self.calls.append(list(args))
        self.spent_s.append(0.0)
        length = self.length(args)
        if not self.measuring or length < self.options.min_length:
            return self.gm(*args)
        problem, begun = self.problem([self.calls[-1]], length, 0.0), time.perf_counter()
        with store_of(problem, self.layer.key) as store, Progress() as progress:
            if not store.lasting:
                return self.gm(*args)
            output = run_along(problem, store, progress)
        self.spent_s[-1] = time.perf_counter() - begun
        return output

    def length(self, args: Sequence[Any]) -> int:
        """Tokens of a call."""
        return self.shapes.length(self.shapes.sizes(args))

    def problem(self, inputs: list[list[Any]], length: int, spent_s: float) -> Problem:
        """What some of its calls are to tuning."""
        return Problem(
            self.gm, inputs, self.found.sites, self.options, length,
            weights=self.layer.sites, spent_s=spent_s,
        )  # fmt: skip


class Recorder:
    """A Dynamo backend that compiles nothing and remembers graphs that can be tuned."""

    def __init__(self, options: Options, *, measuring: bool = False) -> None:
        """Record for tuning with `options`, and profile while the graphs run if `measuring`."""
        self.options = options
        self.measuring = measuring
        self.interrupted = False
        self.graphs: list[Recorded] = []
        self.refused: dict[str, str] = {}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Take a graph."""
        found = plan(gm, example_inputs, self.options.min_length, self.options.compensation)
        self.refused |= found.refused
        if not found.sites or standing_reason(example_inputs, self.options):
            return gm.forward
        named = [(name, example_inputs[n]) for n, name in weight_names(gm, example_inputs).items()]
        layer = new_layer(named, {site.name: site.heads for site in found.sites}, found.gm.code)
        shapes = Shapes.of(example_inputs, found.sites)
        self.graphs.append(
            Recorded(found.gm, layer, found, shapes, self.options, self.measuring)
        )  # fmt: skip
        return self.graphs[-1]


@dataclass(frozen=True, slots=True)
class Task:
    """What a helper needs to know: the model or how to load it, inputs on the CPU, options."""

    model: nn.Module | Callable[[], nn.Module]
    inputs: Sequence[Input]
    options: dict[str, Any]


def tune(
    model: nn.Module,
    inputs: Sequence[Input],
    *,
    executor: str | None = None,
    workers: int | None = None,
    loader: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Policy:
    """Tune a model on real inputs and keep the policy in the cache.

    An interrupted tuning goes on where it stopped, if model, inputs and options are the same.

    Args:
        model: Any module; it runs as it is, dense, under `torch.no_grad`.
        inputs: Inputs of `model`: a tensor, positional arguments or keyword arguments each. Of two
            or more of a length bucket the last is held out for validation.
        executor: Who shares the work: None (nobody), `local` (processes of this machine), `ray`
            (tasks on a Ray cluster with the same cache folder), or `torchrun` (all ranks, each of
            which calls this with equal arguments).
        workers: Processes with this one, for `local` and `ray`; by default one a GPU.
        loader: How a helper loads the model; must be possible to pickle. Without it the model
            itself is sent.
        **options: As in `torch.compile(options=…)`.

    Returns:
        The policy, with every tuning that is known of the model. With `tuning_budget_s` it may not
        be complete.

    Raises:
        ValueError: No input, a wrong option, or no attention call that could be made sparse.
    """
    if not inputs:
        raise ValueError("inputs is empty: give one or more inputs of the model")
    wishes = parse(options)
    if executor in ("local", "ray") and wishes.evaluator != "profile":
        raise ValueError(f"evaluator {wishes.evaluator!r} cannot be shared; use 'profile'")
    task = Task(loader or model, to("cpu", inputs) if executor else inputs, options)
    alone = executor is None and wishes.tuning_budget_s is None and wishes.evaluator == "profile"
    found = recorded(model, inputs, wishes, measuring=alone)
    if not found:
        raise ValueError(
            "no attention call can be made sparse (is max_error 0, or every call shorter than "
            "min_length?); afbs_compile.explain() after a compiled call names the reasons"
        )
    aliases.store(aliases.module_key(model), {key for _, key in found}, wishes.cache_folder)
    policies: dict[str, Policy] = {}
    with ExitStack() as joined:
        for problem, key in found:  # helpers join what is there
            joined.enter_context(store_of(problem, key))
        joined.enter_context(helpers(executor, workers, partial(assist, task)))
        for problem, key in found:
            stored = policies.get(key) or cache.load(key, wishes.cache_folder)
            tuning = measure_now(problem, key, stored, afresh=True)
            policies[key] = (stored or Policy(key, type(model).__name__)).with_tuning(tuning)
    if len(policies) > 1:
        warn(f"the model compiles to graphs with {len(policies)} sets of weights (graph breaks); "
             "each has a policy of its own in the cache, the largest is returned")  # fmt: skip
    return max(policies.values(), key=lambda p: len(p.sites()))


def recorded(
    model: nn.Module, inputs: Sequence[Input], wishes: Options, *, measuring: bool = False
) -> list[tuple[Problem, str]]:
    """The problems that a model poses on some inputs, with the keys of their weights.

    With `measuring` the model's run is also the pass that profiles them, which saves one.
    """
    recorder = Recorder(wishes, measuring=measuring)
    compiled = torch.compile(model, backend=recorder)
    try:
        with torch.no_grad():
            for given in inputs:
                call(compiled, given)
    except KeyboardInterrupt:
        recorder.interrupted = measuring
        if not problems(recorder) or not measuring:
            raise
    return problems(recorder)


def assist(task: Task, n: int) -> None:
    """The n-th helper's work: profile sites of every problem that somebody has asked for."""
    model = task.model if isinstance(task.model, nn.Module) else task.model()
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    for problem, key in recorded(model, to(device, task.inputs), parse(task.options)):
        store = store_of(problem, key)
        if store.folder.is_dir():  # else it is done already
            with store:
                help_out(problem, store)


def to(device: torch.device | str, inputs: Any) -> Any:
    """Inputs with their tensors on another device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)


def call(model: Any, given: Input) -> Any:
    """Call a model with one input."""
    if isinstance(given, Mapping):
        return model(**given)
    return model(given) if isinstance(given, torch.Tensor) else model(*given)


def problems(recorder: Recorder) -> list[tuple[Problem, str]]:
    """One problem for every model and length bucket; its length is the longest seen."""
    result = []
    for graph in recorder.graphs:
        buckets: dict[int, list[tuple[int, list[Any], float]]] = {}
        for args, spent_s in zip(graph.calls, graph.spent_s, strict=True):
            length = graph.length(args)
            if length >= recorder.options.min_length:
                buckets.setdefault(bucket_of(length), []).append((length, args, spent_s))
        for seen in buckets.values():
            lengths, inputs, spent = zip(*seen, strict=True)
            problem = graph.problem(list(inputs), max(lengths), sum(spent))
            problem = replace(problem, interrupted=recorder.interrupted)
            result.append((problem, graph.layer.key))
    return result
