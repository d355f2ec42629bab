"""Which tokens does each KV head of a layer keep, and where? A policy as a plan for memory.

A layer's cache is one matrix `[rows, D]` a sequence. Heads that keep alike form a span of it:
first those that keep everything, `longest` rows a head, then rings of `sink + window` rows. Token
p of a sequence (counted from its own first token) lies in row p of an ordinary head, and of a ring
in row p if p < sink, else `sink + (p − sink) mod window`: over the token that left the window.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from afbs_compile.policy import Head, Policy, Site, Tuning, bucket_of

NUMBER = re.compile(r"\.(\d+)(?:\.|#|$)")
EVERYTHING = 1 << 30  # window of a head that keeps all


@dataclass(frozen=True, slots=True)
class Span:
    """KV heads of a layer that keep the same tokens.

    Attributes:
        heads: KV heads, in the order of their rows.
        base: First row of the first of them.
        slots: Rows of each.
        window: Tokens that a query sees, itself included; `EVERYTHING` for no limit.
        sink: Tokens at the start that are kept beside the window.
    """

    heads: tuple[int, ...]
    base: int
    slots: int
    window: int = EVERYTHING
    sink: int = 0

    @property
    def rows(self) -> int:
        """Rows of all heads."""
        return len(self.heads) * self.slots

    def cuts(self, length: int) -> bool:
        """Whether a query of a sequence of `length` tokens may miss one."""
        return length > self.window


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of one layer's cache."""

    kv_heads: int
    longest: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Rows of a sequence."""
        return sum(span.rows for span in self.spans)

    def columns(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """By KV head: first row, rows, window, sink."""
        found = {
            h: (span.base + n * span.slots, span.slots, span.window, span.sink)
            for span in self.spans
            for n, h in enumerate(span.heads)
        }
        first, slots, window, sink = zip(*(found[h] for h in range(self.kv_heads)), strict=True)
        return list(first), list(slots), list(window), list(sink)


def layout(kept: Sequence[tuple[int, int] | None], longest: int) -> Layout:
    """The layout of a layer.

    Args:
        kept: For every KV head `(window, sink)`, or None for all tokens.
        longest: Tokens of the longest sequence.

    Raises:
        ValueError: A window below 1, a negative sink, or no room at all.
    """
    if longest < 1:
        raise ValueError(f"max_len is {longest}; a cache holds at least 1 token")
    for window, sink in (pair for pair in kept if pair is not None):
        if window < 1 or sink < 0:
            raise ValueError(
                f"a window of {window} with {sink} sink tokens cannot be kept: "
                "a window is at least 1 token, a sink at least 0"
            )
    # a ring that holds the longest sequence never turns over: it is an ordinary head
    whole = [h for h, pair in enumerate(kept) if pair is None or sum(pair) >= longest]
    rings = sorted({pair for pair in kept if pair is not None and sum(pair) < longest})
    spans = [Span(tuple(whole), 0, longest)] if whole else []
    for window, sink in rings:
        heads = tuple(h for h, pair in enumerate(kept) if pair == (window, sink))
        base = sum(span.rows for span in spans)
        spans.append(Span(heads, base, sink + window, window, sink))
    return Layout(len(kept), longest, tuple(spans))


def tuning_for(policy: Policy, longest: int) -> Tuning:
    """The tuning that a cache for `longest` tokens follows.

    One with windows if there is any; of those the one for the bucket of `longest`, else the one of
    the longest bucket.

    Raises:
        ValueError: The policy has no tuning.
    """
    if not policy.tunings:
        raise ValueError(f"the policy of {policy.model_name or policy.model} holds no tuning")
    here = bucket_of(longest)
    return max(
        policy.tunings,
        key=lambda t: (windowed(t), t.bucket == here, t.bucket, t.complete, t.created),
    )


def windowed(tuning: Tuning) -> bool:
    """Whether any head has a window."""
    sites = (site for site in tuning.sites.values() if site.decision != "dense")
    return any(head.mode == "window" for site in sites for head in site.heads)


def sites_by_layer(tuning: Tuning, layers: int) -> list[Site | None]:
    """The site of every layer, by the first number in its name; None where there is none.

    Raises:
        ValueError: A name without a number, a layer that the model has not, or one with two sites.
    """
    found: list[Site | None] = [None] * layers
    for name, site in tuning.sites.items():
        number = NUMBER.search(f".{name}")
        if number is None or int(number[1]) >= layers:
            raise ValueError(f"site {name!r} belongs to none of the model's {layers} layers")
        if found[int(number[1])] is not None:
            raise ValueError(f"layer {number[1]} has two sites; a cache knows one for each layer")
        found[int(number[1])] = site
    return found


def kept_by_group(site: Site) -> list[tuple[int, int] | None]:
    """For every KV head of a site `(window, sink)`, or None where all tokens are needed.

    Raises:
        ValueError: The query heads of one KV head do not agree.
    """
    if site.decision == "dense":
        return [None] * site.kv_heads
    size, found = len(site.heads) // site.kv_heads, []
    for group in range(site.kv_heads):
        heads = site.heads[group * size : (group + 1) * size]
        wanted = {kept_by(head) for head in heads}
        if len(wanted) > 1:
            modes = ", ".join(f"{head.mode} {head.window or ''}".strip() for head in heads)
            raise ValueError(
                f"{site.name}: the query heads of KV head {group} do not agree ({modes}), but "
                "they read the same keys; give all heads of a KV group one window, or none"
            )
        found.append(wanted.pop())
    return found


def kept_by(head: Head) -> tuple[int, int] | None:
    """`(window, sink)` of a head, or None if it needs all tokens."""
    return (head.window, head.sink) if head.mode == "window" else None
