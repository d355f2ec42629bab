"""What runs instead of the compiled graph: hands it the policy that fits the call's lengths.

A graph with symbolic sizes serves many lengths. Thresholds belong to a length bucket and a mask
was classified at one size, so at a size not seen before the runner checks the masks again and
looks the tuning up (or calibrates, with the call's own inputs). After that a call costs one
dictionary look-up. Policies are inputs of the compiled graph: new values never recompile. Dynamo
may hand the graph of one model to another of the same class, whose weights are inputs too; so a
policy is looked up by the weights that the call brings.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from afbs_compile.identity import model_key
from afbs_compile.logs import warn
from afbs_compile.options import Options
from afbs_compile.passes.plan import Plan
from afbs_compile.passes.rewrite import Site
from afbs_compile.passes.sites import dotted, value
from afbs_compile.policy import Policy, Tuning, bucket_of
from afbs_compile.policy_tensor import stacked
from afbs_compile.problem import Problem
from afbs_compile.report import JOURNAL, SiteReport
from afbs_compile.source import LOCK, Unusable, resolve

Sizes = tuple[int, ...]
Weights = tuple[int, ...]  # `id` of every weight
RUNNERS: "weakref.WeakSet[Running]" = weakref.WeakSet()


class Running(Protocol):
    """Something that runs with policies, which can be swapped."""

    def has(self, model: str) -> bool:
        """Does it run with the policy of this model?"""
        ...

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the policy's model from it."""
        ...


@dataclass(frozen=True, slots=True)
class Shapes:
    """Symbolic sizes of a graph: where they come in, and what they make of a length.

    Attributes:
        positions: Places of the sizes among the graph's inputs.
        symbols: Their sympy symbols, in the same order.
        lengths: Key length of every site: an int or a sympy expression.
    """

    positions: tuple[int, ...]
    symbols: tuple[Any, ...]
    lengths: tuple[Any, ...]

    @staticmethod
    def of(inputs: Sequence[Any], sites: Sequence[Site]) -> "Shapes":
        """Read them off the compile-time inputs and the sites' fake tensors."""
        places = tuple(n for n, x in enumerate(inputs) if isinstance(x, SymInt))
        symbols = tuple(inputs[n].node.expr for n in places)
        sizes: list[Any] = [value(site.key).shape[2] for site in sites]
        lengths = (s.node.expr if isinstance(s, SymInt) else s for s in sizes)
        return Shapes(places, symbols, tuple(set(lengths)))

    def sizes(self, args: Sequence[Any]) -> Sizes:
        """The call's symbolic sizes."""
        return tuple(args[n] for n in self.positions)

    def length(self, sizes: Sizes) -> int:
        """The longest key length of any site, in tokens."""
        known = dict(zip(self.symbols, sizes, strict=True))
        found = (n if isinstance(n, int) else int(n.xreplace(known)) for n in self.lengths)
        return max(found)


class Runner:
    """A compiled graph with its policies; callable like the graph."""

    def __init__(
        self, gm: GraphModule, options: Options, found: Plan, inputs: Sequence[Any]
    ) -> None:
        """Describe the graph; `compiled` is set once there is something to run."""
        self.gm, self.options = gm, options
        self.sites, self.rules = list(found.sites), found.rules
        self.shapes = Shapes.of(inputs, found.sites)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.place = {node: n for n, node in enumerate(placeholders)}
        self.names = weight_names(gm, inputs)
        self.device = next(x.device for x in inputs if isinstance(x, Tensor))
        self.compiled: Callable[..., Any] = gm.forward
        self.dense: Callable[..., Any] = torch.compile(
            gm, dynamic=True
        )  # compiles when first used
        self.policies: dict[tuple[Weights, Any], Tensor | None] = {}  # by weights and `Sizes`
        self.buckets: dict[tuple[Weights, Any], Tensor | None] = {}  # by weights and bucket
        self.keys: dict[Weights, str] = {}
        self.given: dict[str, Policy] = {}
        RUNNERS.add(self)

    def settle(self, tuning: Tuning | None, args: Sequence[Any]) -> None:
        """Take the tuning at the compile-time sizes (None: none is to be had), before compiling.

        With fixed sizes, sites that stay dense are dropped. With symbolic ones they are kept,
        since they may gain at another length.
        """
        gains = self.gains(tuning) if tuning else []
        if not self.shapes.positions:
            self.sites = gains
        policy = self.tensor(tuning) if tuning and gains else None
        weights, sizes = self.weights(args), self.shapes.sizes(args)
        self.policies[weights, sizes] = policy
        self.buckets[weights, bucket_of(self.shapes.length(sizes))] = policy

    def __call__(self, *args: Any) -> Any:
        """Run the graph; the arguments are those of Dynamo's graph."""
        call = self.weights(args), self.shapes.sizes(args)
        policy = self.policies[call] if call in self.policies else self.prepare(call, args)
        if policy is None:
            return self.dense(*args)
        return self.compiled(*args, policy)

    def weights(self, args: Sequence[Any]) -> Weights:
        """Which weights the call brings."""
        return tuple([id(args[n]) for n in self.names])

    def prepare(self, call: tuple[Weights, Sizes], args: Sequence[Any]) -> Tensor | None:
        """The policy tensor for a call not seen before; None if it is better off dense."""
        with LOCK:
            if call not in self.policies:
                self.policies[call] = self.find(call, args)
            return self.policies[call]

    def find(self, call: tuple[Weights, Sizes], args: Sequence[Any]) -> Tensor | None:
        """Check the masks, then look the length bucket up."""
        length = self.shapes.length(call[1])
        for rule in self.rules:
            if not rule.holds([args[self.place[node]] for node in rule.sizes]):
                warn(f"a mask changes its form at {length} tokens; such calls run dense")
                return None
        if length < self.options.min_length:
            return self.tensor(None)
        slot = call[0], bucket_of(length)
        if slot not in self.buckets:
            self.buckets[slot] = self.tuned(args, length)
        return self.buckets[slot]

    def tuned(self, args: Sequence[Any], length: int) -> Tensor | None:
        """The policy tensor of a call's length bucket; None if nothing gains."""
        try:
            tuning = self.tuning(args, length)
        except Unusable as reason:
            JOURNAL.add_sites([SiteReport(s.name, "dense", str(reason)) for s in self.sites])
            return None
        return self.tensor(tuning) if self.gains(tuning) else None

    def gains(self, tuning: Tuning) -> list[Site]:
        """The sites that a tuning makes sparse."""
        known = tuning.sites
        return [s for s in self.sites if s.name in known and known[s.name].decision == "sparse"]

    def tuning(self, args: Sequence[Any], length: int) -> Tuning:
        """The tuning for a call.

        Raises:
            Unusable: None is to be had.
        """
        problem = Problem(self.gm, [list(args)], self.sites, self.options, length)
        key = self.key(args)
        return resolve(problem, key, self.given.get(key))

    def key(self, args: Sequence[Any]) -> str:
        """The key of the model whose weights the call brings; of the code if it has none."""
        weights = self.weights(args)
        if weights not in self.keys:
            named = [(name, args[n]) for n, name in self.names.items()]
            self.keys[weights] = model_key(named, "" if named else self.gm.code)
            for _, weight in named:  # an id may be given out again once its tensor is gone
                weakref.finalize(weight, partial(forget, weakref.ref(self), weights))
        return self.keys[weights]

    def tensor(self, tuning: Tuning | None) -> Tensor:
        """Policies of all sites, `[sites, Hmax, COLUMNS]`; a site without one is dense."""
        sites = [(site.name, site.heads) for site in self.sites]
        return stacked(sites, tuning.sites if tuning else {}).to(self.device)

    def has(self, model: str) -> bool:
        """Was the graph called with the weights of this model?"""
        return model in self.keys.values()

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the policy's model from it."""
        with LOCK:
            self.given[policy.model] = policy
            self.policies.clear()
            self.buckets.clear()


def forget(runner: "weakref.ref[Runner]", weights: Weights) -> None:
    """Drop what a runner knows of weights that are gone."""
    if alive := runner():
        alive.keys.pop(weights, None)
        purge(alive.policies, weights)
        purge(alive.buckets, weights)


def purge(known: dict[tuple[Weights, Any], Tensor | None], weights: Weights) -> None:
    """Drop the entries of some weights."""
    for call in [c for c in list(known) if c[0] == weights]:
        known.pop(call, None)


def weight_names(gm: GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """Places and module paths of the inputs that belong to the model rather than to the call."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    sources = [source_name(node) for node in placeholders]
    return {
        n: dotted(source)
        for n, (source, x) in enumerate(zip(sources, inputs, strict=True))
        if isinstance(x, torch.nn.Parameter) or (isinstance(x, Tensor) and "_buffers" in source)
    }


def source_name(node: Node) -> str:
    """Where Dynamo found an input, as text."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", node.name)
    return str(name() if callable(name) else name)


def use_policy(policy: Policy) -> int:
    """Make every running graph of the policy's model use it from the next call on.

    No graph is recompiled.

    Returns:
        How many graphs took it; 0 if no compiled model has the policy's key.
    """
    fitting = [runner for runner in list(RUNNERS) if runner.has(policy.model)]
    for runner in fitting:
        runner.use(policy)
    return len(fitting)
