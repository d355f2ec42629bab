"""What does a choice of windowed heads become? A policy, and what it will save.

Windowed heads are lists of blocks like all others, so one policy may hold windowed and sparse
heads: `combined` takes the thresholds of the global heads from a tuned policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from afbs_compile.calibrate import describe
from afbs_compile.hybrid_objective import GLOBAL, windowed
from afbs_compile.kernels.dispatch import block_sizes
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible, site_visible
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head, Policy, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.policy_tensor import rows
from afbs_compile.tuner.heads import Bits, Layout

KIND = "hybrid"
CHOICE = ("selector", "compensation")  # options that thresholds were tuned for
Options = dict[str, float | str]


def sites_of(
    bits: Bits, sites: Sequence[Site], *, window: int, sink: int, length: int, device_type: str
) -> dict[str, SitePolicy]:
    """The policy of every site; a site without windowed heads is dense.

    Args:
        bits: Which KV groups are windowed [N], site by site.
        sites: In the order of the bits.
        window: Keys of a windowed head.
        sink: Its first tokens.
        length: At which the density is told, in tokens.
        device_type: Whose blocks it counts.
    """
    layout = Layout(tuple(site.kv_heads for site in sites))
    local = replace(windowed(window, sink), density=density(window, sink, length, device_type))
    result = {}
    for n, site in enumerate(sites):
        repeat = site.heads // site.kv_heads
        own = [bool(bit) for bit in bits[layout.bits_of(n)] for _ in range(repeat)]
        heads = tuple(local if bit else replace(GLOBAL, density=1.0) for bit in own)
        decision = "sparse" if any(own) else "dense"
        reason = None if any(own) else "no head is windowed"
        result[site.name] = SitePolicy(
            site.name, heads, site.kv_heads, site.head_dim, describe(site), decision, reason
        )
    return result


def density(window: int, sink: int, length: int, device_type: str) -> float:
    """Visited over visible blocks of a windowed head in a causal call of `length` tokens."""
    block_m, block_n = block_sizes(device_type)
    cpu = torch.device("cpu")
    q, k = Blocks.of(length, block_m, cpu), Blocks.of(length, block_n, cpu)
    seen = head_visible(Mask(True), rows([windowed(window, sink)]), q, k)
    return float(seen.sum()) / float(site_visible(Mask(True), q, k).sum())


def combined(hybrid: Policy, tuned: Policy) -> Policy:
    """Windowed heads as in `hybrid`, global heads as in `tuned`, for every bucket of `tuned`.

    Args:
        hybrid: Of `afbs_compile.hybridize`.
        tuned: Of `afbs_compile.tune`, on the same model.

    Raises:
        ValueError: They are of different models, or one holds nothing of use.
    """
    if hybrid.model != tuned.model:
        raise ValueError(f"the policies are of the models {hybrid.model} and {tuned.model}")
    windows = next((t for t in hybrid.tunings if t.options.get("kind") == KIND), None)
    if windows is None:
        raise ValueError("the first policy windows no heads; make it with `afbs hybridize`")
    plain = [t for t in tuned.tunings if t.options.get("kind") != KIND]
    if not plain:
        raise ValueError("the second policy has no thresholds; make it with `afbs tune`")
    newest = {t.bucket: t for t in sorted(plain, key=lambda t: (t.complete, t.created))}
    tunings = [
        replace(t, options=both(windows.options, t.options), sites=merged(windows.sites, t.sites))
        for t in newest.values()
    ]
    return Policy(hybrid.model, hybrid.model_name, tuple(tunings))


def both(windows: Options, tuned: Options) -> Options:
    """How the windows were found, and how blocks are chosen: thresholds mean nothing without."""
    return {**windows, **{name: tuned[name] for name in CHOICE if name in tuned}}


def merged(
    windows: Mapping[str, SitePolicy], tuned: Mapping[str, SitePolicy]
) -> dict[str, SitePolicy]:
    """Sites of both; where both know a site, its windowed heads are those of `windows`."""
    result = dict(tuned)
    for name, site in windows.items():
        other = tuned.get(name, site)
        heads = tuple(
            mine if mine.mode == "window" else threshold(theirs, other)
            for mine, theirs in zip(site.heads, other.heads, strict=True)
        )
        acts = any(head.mode != "dense" for head in heads)
        result[name] = replace(
            other, heads=heads, decision="sparse" if acts else "dense",
            reason=None if acts else other.reason, seconds_sparse=None,
        )  # fmt: skip
    return result


def threshold(head: Head, site: SitePolicy) -> Head:
    """What a global head does at a site that may be dense as a whole."""
    return replace(head, mode="dense", density=1.0) if site.decision == "dense" else head


def forecast(tuning: Tuning, length: int, bytes_each: int = 2) -> dict[str, float]:
    """What windowed heads save at a length: counted, not measured.

    Args:
        tuning: Of a hybrid policy.
        length: Tokens in the context.
        bytes_each: Of a number in the KV cache.

    Returns:
        `kv_bytes` and `kv_bytes_dense` of one sequence; `decode_reads`, what attention reads for a
        token, and `prefill_blocks`, what it visits, as shares of dense.
    """
    kv = dense = visited = heads = 0.0
    for site in tuning.sites.values():
        repeat = len(site.heads) // site.kv_heads
        for head in site.heads:
            local = head.mode == "window"
            held = min(length, head.window + head.sink) if local else length
            size = 2 * site.head_dim * bytes_each / repeat
            kv, dense = kv + held * size, dense + length * size
            visited += density(head.window, head.sink, length, "cuda") if local else 1.0
            heads += 1
    return {
        "length": float(length),
        "kv_bytes": kv,
        "kv_bytes_dense": dense,
        "decode_reads": kv / dense,
        "prefill_blocks": visited / heads,
    }
