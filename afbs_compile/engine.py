"""Which thresholds does a module's attention take outside a compiled graph?

An engine belongs to one root module, whose calls it watches through hooks. At a length that was
never tuned it traces the module and tunes (`shelf`), with the tuner, the cache and the site names
of the compile path. Whoever runs the attention (`integrations`, `intercept`) asks call by call.
"""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import afbs_compile.kernels.op  # noqa: F401  registers the op
from afbs_compile.calls import refusal
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.refusals import no_backward
from afbs_compile.options import Options, disabled
from afbs_compile.policy import Policy, bucket_of
from afbs_compile.report import JOURNAL, SiteReport
from afbs_compile.rulings import Ruling, ruling_of, running
from afbs_compile.runner import RUNNERS
from afbs_compile.shelf import Shelf

LengthOf = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], int | None]
Plain = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
Signature = tuple[tuple[int, ...], ...]
MOST_SIGNATURES = 256

ENGINES: "weakref.WeakKeyDictionary[nn.Module, Engine]" = weakref.WeakKeyDictionary()


class Here(threading.local):
    """One thread's forward pass: calls by module, and the longest key length so far."""

    def __init__(self) -> None:
        """Nothing was called yet."""
        self.calls: Counter[str] = Counter()
        self.longest = 0


class Engine:
    """The attention of one root module; its policies are on a shelf."""

    def __init__(
        self,
        root: nn.Module,
        options: Options,
        length_of: LengthOf | None = None,
        plain: Plain | None = None,
    ) -> None:
        """Watch `root`.

        Args:
            root: The module whose weights name the model, as `torch.compile` would be given it.
            options: As of `torch.compile`.
            length_of: The longest key length of a call of `root`, if its inputs show it.
            plain: Keyword arguments without what means nothing, such as a mask that hides nothing;
                None if the call is none to tune with.
        """
        self.root, self.options = weakref.ref(root), options
        self.length_of, self.plain = length_of, plain
        self.shelf = Shelf(root, options)
        self.rulings: dict[tuple[int, str, torch.device], Ruling] = {}
        self.lengths: dict[Signature, int] = {}
        self.here = Here()
        self.handles = [
            root.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            root.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        ENGINES[root] = self
        RUNNERS.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        """A copied module keeps its hooks, which do nothing for a root that is not theirs."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled module comes back without an engine."""
        return Nobody, ()

    def remove(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()
        if (root := self.root()) is not None:
            ENGINES.pop(root, None)
        RUNNERS.discard(self)

    def before(self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A forward pass begins: tune if its length was never tuned."""
        if torch.compiler.is_compiling() or root is not self.root():
            return
        expected = self.expected(root, args, kwargs)
        if self.worth_tuning(root, args, kwargs, expected):
            given = self.plain(kwargs) if self.plain else kwargs
            if given is not None:
                expected = self.shelf.tune(root, args, given, expected)
            self.rulings.clear()
        self.here.calls.clear()
        self.here.longest = expected or 0

    def after(
        self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A forward pass is over: remember how long its keys were."""
        if torch.compiler.is_compiling() or root is not self.root() or not self.here.longest:
            return
        if len(self.lengths) < MOST_SIGNATURES:
            self.lengths[signature(args, kwargs)] = self.here.longest

    def expected(
        self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> int | None:
        """The longest key length of a call that begins, if it is known."""
        length = self.length_of(root, args, kwargs) if self.length_of else None
        return self.lengths.get(signature(args, kwargs)) if length is None else length

    def worth_tuning(
        self,
        root: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        expected: int | None,
    ) -> bool:
        """Is a call long enough, of a length not tuned yet, and could it run sparse?"""
        least, shelf = self.options.min_length, self.shelf
        if disabled() or self.options.error_cap == 0:
            return False
        if expected is None:  # the keys of a policy are not known before the first trace
            long = most_numbers(args, kwargs) >= least
            return long and None not in shelf.tried and not untrainable(root) and (
                shelf.identify() is None)  # fmt: skip
        bucket = bucket_of(expected)
        new = expected >= least and bucket not in shelf.tried and not untrainable(root)
        return new and shelf.sites_at(bucket) is None

    def has(self, policy: Policy) -> bool:
        """Does the root run with the weights that this policy was made with?"""
        return policy.model in (self.shelf.models or ())

    def use(self, policy: Policy) -> None:
        """From the next call on take the thresholds of the policy's model from it."""
        self.shelf.use(policy)
        self.rulings.clear()

    def attend(
        self,
        path: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | str,
        scale: float | None,
        dropout_p: float = 0.0,
        enable_gqa: bool = True,
        keys: Tensor | None = None,
        elements: Tensor | None = None,
    ) -> Tensor | None:
        """Run one call sparse; None, and the reason counted, if it must be SDPA.

        Args:
            path: The module that calls.
            q: `[B, Hq, Lq, D]`.
            k: `[B, Hkv, Lk, D]`.
            v: `[B, Hkv, Lk, D]`.
            mask: The call's mask, or why it is none that the kernels know.
            scale: Multiplier on q·k; None is D^-½.
            dropout_p: Of the attention weights.
            enable_gqa: Whether there may be fewer key than query heads.
            keys: bool `[B, Lk]`, keys that are no padding; beside the mask.
            elements: bool, broadcastable to `[B, Hq, Lq, Lk]`; beside the mask.
        """
        name = self.named(path)
        options = self.options
        reason = refusal(
            q, k, v, dropout_p=dropout_p, enable_gqa=enable_gqa,
            min_length=options.min_length, compensation=options.compensation,
            masked=keys is not None or elements is not None,
        )  # fmt: skip
        if reason is None and isinstance(mask, str):
            reason = mask
        if reason is not None or isinstance(mask, str):
            self.note(SiteReport(name, "refused", reason), q)
            return None
        ruling = self.ruling(name, q, k).fitting(q, k, mask, masked=elements is not None)
        if ruling.rows is None:
            self.note(SiteReport(name, "dense", ruling.reason), q)
            return None
        self.note(running(name, ruling, q), q)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out: Tensor = torch.ops.afbs.attention(
            q, k, v, ruling.rows, mask.causal, mask.offset, mask.window, scale,
            options.selector, options.min_length, options.compensation, keys, None, None, elements,
        )  # fmt: skip
        return out

    def named(self, path: str) -> str:
        """The site's name: the path, and an ordinal if the module calls again."""
        n = self.here.calls[path]
        self.here.calls[path] += 1
        return f"{path}#{n}" if n else path

    def note(self, report: SiteReport, q: Tensor) -> None:
        """Count a call; a step of a single token is none that anybody asks about."""
        if q.shape[2] > 1:
            JOURNAL.add_call(report)

    def ruling(self, name: str, q: Tensor, k: Tensor) -> Ruling:
        """What a site does at the length of the pass."""
        self.here.longest = max(self.here.longest, k.shape[2])
        bucket = bucket_of(self.here.longest)
        slot = bucket, name, q.device
        if slot not in self.rulings:
            self.rulings[slot] = ruling_of(self.shelf.sites_at(bucket), name, bucket, q.device)
        return self.rulings[slot]


class Nobody:
    """What is left of an engine in a pickled module: hooks that do nothing."""

    def before(self, *args: Any) -> None:
        """Do nothing."""

    def after(self, *args: Any) -> None:
        """Do nothing."""


def untrainable(root: nn.Module) -> bool:
    """Will calls need gradients where there is no backward?"""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad and no_backward(p.device.type) for p in root.parameters())


def signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
    """The shapes of a call's tensors."""
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    return tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor))


def most_numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The size of a call's largest tensor: it has no more tokens than that."""
    return max((math.prod(shape) for shape in signature(args, kwargs)), default=0)
