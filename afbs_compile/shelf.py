"""Which policies does a root module have? The cache's, a given one, or what tuning finds now.

A module is known by all its weights; `aliases` tells which graphs it was traced into, and their
keys name the policies. So the compile path's policies serve here, and those made here serve there.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from afbs_compile import aliases, cache
from afbs_compile.logs import warn
from afbs_compile.options import Options
from afbs_compile.policy import Policy, PolicyError, bucket_of
from afbs_compile.problem import Problem
from afbs_compile.rulings import Sites
from afbs_compile.source import LOCK, Unusable, resolve
from afbs_compile.tracing import Tracer, Untraceable
from afbs_compile.weights import named


class Shelf:
    """The policies of one root module, by length bucket."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        """Nothing is read before it is asked for."""
        self.root, self.options = weakref.ref(root), options
        self.own_key: str | None = None
        self.models: tuple[str, ...] | None = None  # None: not known, the root was never traced
        self.given: Policy | None = None
        self.known: dict[int, Sites | str | None] = {}  # by bucket; None: not tuned; or why not
        self.tried: set[int | None] = set()
        self.trace = Tracer(options)

    def identify(self) -> tuple[str, ...] | None:
        """The keys of the root's policies, if it was ever traced."""
        root = self.root()
        if self.models is None and root is not None:
            if self.own_key is None:
                self.own_key = aliases.module_key(root)
            self.models = aliases.load(self.own_key, self.options.cache_folder)
        return self.models

    def sites_at(self, bucket: int) -> Sites | str | None:
        """The policies of a length bucket by site; None if not tuned yet, or why it cannot be."""
        if bucket not in self.known:
            with LOCK:
                self.known[bucket] = self.look_up(bucket)
        return self.known[bucket]

    def look_up(self, bucket: int) -> Sites | None:
        """Read the policies of a bucket."""
        found: Sites = {}
        for key in self.identify() or ():
            policy = self.policy_of(key)
            if policy is None:
                continue
            if policy is self.given or self.options.policy is not None:
                tuning = policy.find_any(bucket) or policy.find_longer(bucket)
            else:
                tuning = policy.find(bucket, self.options.tuning_fingerprint())
            found |= tuning.sites if tuning else {}
        return found or None

    def policy_of(self, key: str) -> Policy | None:
        """The policy of a model: the one that was given, or the cache's."""
        if self.given is not None and self.given.model == key:
            return self.given
        if self.options.policy is None:
            return cache.load(key, self.options.cache_folder)
        try:
            policy = Policy.read(self.options.policy)
        except PolicyError as error:
            warn(f"{error}. The model runs dense.")
            return None
        return policy if policy.model == key else None

    def tune(
        self,
        root: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        expected: int | None,
    ) -> int | None:
        """Trace the root on a call's inputs and tune what was found; the length, if known."""
        bucket = bucket_of(expected) if expected else None
        self.tried.add(bucket)
        with LOCK:
            try:
                found = self.trace(root, args, kwargs)
            except Untraceable as error:
                warn(f"{error}. It runs dense; try afbs_compile.tune() on it.")
                if bucket:
                    self.known[bucket] = str(error)
                return expected
            for problem, key in found:
                self.learn(problem, key)
            self.models = tuple(sorted({key for _, key in found} | {*(self.models or ())}))
            if self.models and self.own_key:
                aliases.store(self.own_key, self.models, self.options.cache_folder)
            return max((problem.length for problem, _ in found), default=expected)

    def learn(self, problem: Problem, key: str) -> None:
        """Tune one problem, or take its tuning from where it is."""
        bucket = bucket_of(problem.length)
        self.tried.add(bucket)
        before = self.known.get(bucket)
        try:
            given = self.given if self.given and self.given.model == key else None
            sites = resolve(problem, named(key), given).sites
        except Unusable as reason:
            self.known[bucket] = before or str(reason)
            return
        self.known[bucket] = sites if before is None or isinstance(before, str) else before | sites

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the policy's model from it."""
        with LOCK:
            self.given = policy
            self.known.clear()
