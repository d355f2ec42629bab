"""What runs instead of the compiled graph: hands it the policy that fits the call's lengths.

A graph with symbolic sizes serves many lengths. Thresholds belong to a length bucket and a mask
was classified at one size, so at a size not seen before the runner checks the masks again and
looks the tuning up (or calibrates, with the call's own inputs). After that a call costs one
dictionary look-up. Policies are inputs of the compiled graph: new values never recompile.

A graph serves many layers too: all blocks of a model that are compiled one by one, or under FSDP2,
and models of one class. Their weights are inputs, so policies are looked up by the weights that
the call brings (`afbs_compile.weights`). Layers with other sparse sites than the first one's run
another variant of the graph, which is compiled when it is first needed.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from afbs_compile.inputs import Shapes, Sizes, weight_names
from afbs_compile.logs import warn
from afbs_compile.options import Options
from afbs_compile.outcome import report
from afbs_compile.passes.plan import Plan
from afbs_compile.passes.rewrite import Site, rewrite
from afbs_compile.passes.sites import value
from afbs_compile.policy import Policy, Tuning, bucket_of
from afbs_compile.policy_tensor import stacked, with_budgets
from afbs_compile.problem import Problem
from afbs_compile.source import LOCK, Unusable, check_again, resolve
from afbs_compile.watch import Watch
from afbs_compile.weights import Layer, layer_of

Weights = tuple[int, ...]  # `id` of every weight
RUNNERS: "weakref.WeakSet[Running]" = weakref.WeakSet()


class Running(Protocol):
    """Something that runs with policies, which can be swapped."""

    def has(self, policy: Policy) -> bool:
        """Does it run with the weights that this policy was made with?"""
        ...

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the policy's model from it."""
        ...


@dataclass(slots=True)
class Bound:
    """What the calls of a layer in a length bucket run.

    Attributes:
        run: The variant of the graph.
        sites: Those that it makes sparse.
        tuned: Their policies as tuned, `[sites, Hmax, COLUMNS]`, on the host.
        policy: The same with budgets, on the device; None if the variant takes none.
    """

    run: Callable[..., Any]
    sites: list[Site]
    tuned: Tensor
    policy: Tensor | None


class Runner:
    """A compiled graph with its policies; callable like the graph."""

    def __init__(
        self, came: GraphModule, options: Options, found: Plan, inputs: Sequence[Any]
    ) -> None:
        """Describe the graph; `variants` take what is compiled."""
        self.came, self.gm, self.options = came, found.gm, options
        self.sites, self.rules = list(found.sites), found.rules
        self.shapes = Shapes.of(inputs, found.sites)
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        self.place = {node: n for n, node in enumerate(placeholders)}
        self.names = weight_names(self.gm, inputs)
        self.device = next(x.device for x in inputs if isinstance(x, Tensor))
        self.first = self.sites  # those of the variant that is compiled first
        self.training = any(needs_gradient(site) for site in self.sites)
        self.variants: dict[tuple[str, ...], Callable[..., Any]] = {}  # by names of sparse sites
        self.bounds: dict[tuple[Weights, Sizes], Bound] = {}
        self.buckets: dict[tuple[Weights, int], Bound] = {}  # by weights and bucket
        self.layers: dict[Weights, Layer] = {}
        self.given: dict[str, Policy] = {}  # by key of the layer
        self.watch = Watch(0 if options.policy else options.calibration_calls)
        RUNNERS.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph; the arguments are those of Dynamo's graph."""
        try:
            bound = self.bounds.get((self.weights(args), self.shapes.sizes(args)))
        except TypeError:  # symbolic sizes have no hash: DDPOptimizer asks for the strides
            bound = None
        if bound is None:
            bound = self.prepare(args)
        return bound.run(*args) if bound.policy is None else bound.run(*args, bound.policy)

    def weights(self, args: Sequence[Any]) -> Weights:
        """Which weights the call brings."""
        return tuple([id(args[n]) for n in self.names])

    def prepare(self, args: Sequence[Any]) -> Bound:
        """What a call not seen before runs."""
        if any(isinstance(x, FakeTensor) for x in args):  # DDPOptimizer asks for the strides
            return self.bound(self.first, None)
        call = self.weights(args), self.shapes.sizes(args)
        with LOCK:
            found = self.bounds.get(call)
            if found is None:
                found = self.find(call, args)
                if (call[0], bucket_of(self.shapes.length(call[1]))) not in self.watch.open:
                    self.bounds[call] = found
            return found

    def find(self, call: tuple[Weights, Sizes], args: Sequence[Any]) -> Bound:
        """Check the masks, then look the length bucket up."""
        length = self.shapes.length(call[1])
        for rule in self.rules:
            if not rule.holds([args[self.place[node]] for node in rule.sizes]):
                warn(f"a mask changes its form at {length} tokens; such calls run dense")
                return self.bound([], None)
        if self.shapes.query_length(call[1]) < self.options.min_length:
            return self.bound(self.first, None)
        slot = call[0], bucket_of(length)
        if slot not in self.buckets:
            self.bind(args, self.tuning(args))
        elif (known := self.watch.due(slot)) is not None:
            self.bind(args, self.again(args, known))
        return self.buckets[slot]

    def bind(self, args: Sequence[Any], tuning: Tuning | None, ahead: bool = False) -> None:
        """Let calls like this one run by `tuning`, dense if it is None; `ahead` of the first."""
        weights, length = self.weights(args), self.shapes.length(self.shapes.sizes(args))
        layer, slot = self.layer(args), (weights, bucket_of(length))
        self.buckets[slot] = self.bound(self.sparse_sites(tuning), tuning, layer)
        self.watch.note(slot, None if layer.key in self.given else tuning, ahead)

    def tuning(self, args: Sequence[Any]) -> Tuning | None:
        """The tuning for a call, or None if none is to be had."""
        layer = self.layer(args)
        found: Tuning | str
        try:
            found = resolve(self.problem(args, layer), layer, self.given.get(layer.key))
        except Unusable as reason:
            found = str(reason)
        report(self.sites, found, layer, first=len(self.layers) == 1)
        return None if isinstance(found, str) else found

    def again(self, args: Sequence[Any], known: Tuning) -> Tuning:
        """The tuning of a bucket after one more call of it."""
        layer = self.layer(args)
        found = check_again(self.problem(args, layer), layer.key, known)
        report(self.sites, found, layer, first=len(self.layers) == 1)
        return found

    def problem(self, args: Sequence[Any], layer: Layer) -> Problem:
        """What a call poses."""
        length = self.shapes.length(self.shapes.sizes(args))
        inputs = [list(args)]
        return Problem(self.gm, inputs, self.sites, self.options, length, weights=layer.sites)

    def sparse_sites(self, tuning: Tuning | None) -> list[Site]:
        """The sites that a variant for this tuning makes sparse.

        With fixed sizes those that gain. With symbolic ones all, if any gains: others may gain at
        another length.
        """
        known = tuning.sites if tuning else {}
        gains = [s for s in self.sites if s.name in known and known[s.name].decision == "sparse"]
        return self.sites if gains and self.shapes.positions else gains

    def bound(self, sites: list[Site], tuning: Tuning | None, layer: Layer | None = None) -> Bound:
        """A variant with its policies."""
        names = tuple(site.name for site in sites)
        if names not in self.variants:
            dynamic = bool(self.shapes.positions) or not sites
            self.variants[names] = later(self.rewritten(sites), dynamic, self.options)
        tuned = self.tensor(sites, tuning)
        bound = Bound(self.variants[names], sites, tuned, None)
        if sites:
            bound.policy = self.effective(bound, layer)
        return bound

    def rewritten(self, sites: list[Site]) -> GraphModule:
        """The graph with some sites made sparse; as it came if none is."""
        if not sites:
            return self.came
        options = self.options
        return rewrite(
            self.gm, sites, self.tensor(sites, None).to(self.device), selector=options.selector,
            min_length=options.min_length, compensation=options.compensation,
        )  # fmt: skip

    def tensor(self, sites: Sequence[Site], tuning: Tuning | None) -> Tensor:
        """Policies `[sites, Hmax, COLUMNS]` on the host; a site without one is dense."""
        if not sites:
            return torch.empty(0)
        named = [(site.name, site.heads) for site in sites]
        rule = self.options.rule_for(self.training)
        return stacked(named, tuning.sites if tuning else {}, rule)

    def effective(self, bound: Bound, layer: Layer | None) -> Tensor:
        """The policies of a variant, with the layer's budgets."""
        names = [site.name for site in bound.sites]
        budgets = {n: b for n, b in layer.budgets.items() if n in names} if layer else {}
        return with_budgets(bound.tuned, names, budgets).to(self.device)

    def layer(self, args: Sequence[Any]) -> Layer:
        """The layer whose weights the call brings."""
        weights = self.weights(args)
        if weights not in self.layers:
            named = [(name, args[n]) for n, name in self.names.items()]
            sites = {site.name: site.heads for site in self.sites}
            self.layers[weights] = layer_of(named, sites, self.gm.code, self.training)
            for _, weight in named:  # an id may be given out again once its tensor is gone
                weakref.finalize(weight, forget, weakref.ref(self), weights)
        return self.layers[weights]

    def has(self, policy: Policy) -> bool:
        """Was the graph called with the weights of this policy, or with a part of them?"""
        return any(fits(policy, layer) for layer in self.layers.values())

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the layers that it fits from a policy."""
        with LOCK:
            for weights, layer in self.layers.items():
                if fits(policy, layer):
                    self.given[layer.key] = policy
                    purge(self, weights)

    def refresh(self, layer: Layer) -> None:
        """Take the layer's budgets; a new tensor, since a backward may still read the old one."""
        with LOCK:
            for (weights, _), bound in self.buckets.items():
                if bound.policy is not None and self.layers.get(weights) is layer:
                    bound.policy = self.effective(bound, layer)


def later(gm: GraphModule, dynamic: bool, options: Options) -> Callable[..., Any]:
    """A variant that compiles when it is first used."""
    return torch.compile(gm, dynamic=dynamic, options=options.inductor or None)


def needs_gradient(site: Site) -> bool:
    """Will autograd go through the site?"""
    parts = (site.call.query, site.call.key, site.call.value)
    return torch.is_grad_enabled() and any(value(part).requires_grad for part in parts)


def forget(runner: "weakref.ref[Runner]", weights: Weights) -> None:
    """Drop what a runner knows of weights that are gone."""
    if alive := runner():
        alive.layers.pop(weights, None)
        purge(alive, weights)


def purge(runner: Runner, weights: Weights) -> None:
    """Drop what the calls of some weights run."""
    for call in [c for c in list(runner.bounds) if c[0] == weights]:
        runner.bounds.pop(call, None)
    for slot in [s for s in list(runner.buckets) if s[0] == weights]:
        runner.buckets.pop(slot, None)
    runner.watch.forget(weights)


def use_policy(policy: Policy) -> int:
    """Make every running graph of the policy's model use it from the next call on.

    No graph is recompiled. A block that is compiled alone takes the sites of a whole model's
    policy that were tuned with the block's weights.

    Returns:
        How many graphs took it; 0 if no compiled model has the policy's weights.
    """
    fitting = [runner for runner in list(RUNNERS) if runner.has(policy)]
    for runner in fitting:
        runner.use(policy)
    return len(fitting)


def fits(policy: Policy, layer: Layer) -> bool:
    """Was the policy made with the layer's weights?"""
    known = {site.weights for tuning in policy.tunings for site in tuning.sites.values()}
    return policy.model == layer.key or bool(known & set(layer.sites.values()))
