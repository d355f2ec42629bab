"""How does a call outside a rewritten graph get at its policy? The op `afbs::policy_of`.

A policy is named by a string, so the op can be traced: the rows are looked up when it runs, by the
length that the call really has. Compiled code holds the name alone, and no threshold.
"""

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.policy_columns import COLUMNS
from afbs_compile.policy import Head, Policy, Site, bucket_of
from afbs_compile.policy_tensor import rows, to_tensor

Heads = Callable[[int, int], Tensor]  # length in tokens, query heads -> rows on the CPU

SOURCES: dict[str, Heads] = {}
ROWS: dict[tuple[str, int, int, torch.device], Tensor] = {}
DIGESTS: dict[int, tuple[Policy, str]] = {}  # by `id`, of policies that are held
MOST_DIGESTS = 32
LOCK = threading.Lock()

LIBRARY: Any = torch.library.Library("afbs", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "policy_of(Tensor k, str source, int heads) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def policy_of(k: Tensor, source: str, heads: int) -> Tensor:
    """The rows of `source` for a call with keys `k` `[B, Hkv, Lk, D]`, float32 `[heads, COLUMNS]`.

    A copy: the memory of an op's result belongs to whoever called it.
    """
    return known_rows(source, k.shape[2], heads, k.device).clone()


def known_rows(source: str, length: int, heads: int, device: torch.device) -> Tensor:
    """The rows of a source at a length, kept on the device."""
    slot = source, bucket_of(length), heads, device
    if slot not in ROWS:
        with LOCK:
            ROWS[slot] = SOURCES[source](length, heads).to(device)
    return ROWS[slot]


def policy_of_fake(k: Tensor, source: str, heads: int) -> Tensor:
    """Shape and dtype of the rows."""
    return k.new_empty((heads, COLUMNS), dtype=torch.float32)


def fixed_source(tau: float) -> str:
    """The name of a policy that keeps the same share of the mass in every head."""
    name = f"tau={tau}"
    SOURCES.setdefault(name, lambda length, heads: rows([Head("sparse", tau)] * heads))
    return name


def site_source(policy: Policy, site: str) -> str:
    """The name of what a policy says of one of its sites.

    Raises:
        ValueError: The policy has no such site.
    """
    name = f"{policy.model}:{digest(policy)}:{site}"
    if name not in SOURCES:
        known = policy.sites()
        if site not in known:
            raise ValueError(f"the policy has no site {site!r}; it has {', '.join(known)}")
        SOURCES[name] = functools.partial(site_rows, policy, site)
    return name


def site_rows(policy: Policy, name: str, length: int, heads: int) -> Tensor:
    """The rows of a site; all dense where the policy does not speak of this length or these heads.

    Args:
        policy: The policy.
        name: The site.
        length: Keys, in tokens.
        heads: Query heads of the call.
    """
    site = site_at(policy, name, length)
    if site is None or len(site.heads) != heads:
        return rows([Head("dense", 1.0)] * heads)
    return to_tensor(site)


def site_at(policy: Policy, name: str, length: int) -> Site | None:
    """What a policy says of a site at a length, or None."""
    tuning = policy.find_any(bucket_of(length)) or policy.find_longer(length)
    return tuning.sites.get(name) if tuning else None


def digest(policy: Policy) -> str:
    """16 hexadecimal digits that tell the contents of policies apart; known ones cost nothing."""
    if id(policy) not in DIGESTS:
        text = policy.to_json().encode()
        DIGESTS[id(policy)] = policy, hashlib.sha256(text).hexdigest()[:16]
        if len(DIGESTS) > MOST_DIGESTS:
            DIGESTS.pop(next(iter(DIGESTS)))
    return DIGESTS[id(policy)][1]


LIBRARY.impl("policy_of", policy_of, "CompositeExplicitAutograd")
torch.library.register_fake("afbs::policy_of", policy_of_fake, lib=LIBRARY)
