"""What is worth saying of a policy? A plain summary for tables and `--json`."""

import re
from typing import Any

from afbs_compile.checks import mean_known
from afbs_compile.policy import Policy, Site, Tuning


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def in_order(tuning: Tuning) -> list[Site]:
    """The sites of a tuning, layers in their order."""
    return sorted(tuning.sites.values(), key=lambda site: natural(site.name))


def summary(policy: Policy) -> dict[str, Any]:
    """A policy without its heads, as JSON."""
    return {
        "model": policy.model,
        "model_name": policy.model_name,
        "tunings": [tuning_summary(tuning) for tuning in policy.tunings],
    }


def tuning_summary(tuning: Tuning) -> dict[str, Any]:
    """A tuning without its heads, as JSON."""
    return {
        "bucket": tuning.bucket,
        "length": tuning.length,
        "options": tuning.options,
        "complete": tuning.complete,
        "evaluations": tuning.evaluations,
        "cost_dense_passes": tuning.cost_dense_passes,
        "seconds": tuning.seconds,
        "created": tuning.created,
        "device": tuning.device,
        "versions": tuning.versions,
        "inputs": list(tuning.inputs),
        "confidence": tuning.confidence,
        "density": tuning.density,
        "max_error": tuning.max_error,
        "mean_error": tuning.mean_error,
        "kl": tuning.kl,
        "perplexity_increase": tuning.perplexity_increase,
        "attention_speedup": attention_speedup(tuning),
        "sites": [site_summary(site) for site in in_order(tuning)],
    }


def site_summary(site: Site) -> dict[str, Any]:
    """A site without its heads, as JSON."""
    errors = [head.error for head in site.heads if head.error is not None]
    return {
        "name": site.name,
        "decision": site.decision,
        "reason": site.reason,
        "mask": site.mask,
        "heads": len(site.heads),
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "density": mean_known([head.density for head in site.heads]),
        "error_min": min(errors, default=None),
        "error_max": max(errors, default=None),
        "error_mean": mean_known(errors),
        "seconds_dense": site.seconds_dense,
        "seconds_sparse": site.seconds_sparse,
    }


def attention_speedup(tuning: Tuning) -> float | None:
    """Dense over decided seconds of all attention, or None if a site was not timed."""
    sites = tuning.sites.values()
    dense = [site.seconds_dense for site in sites]
    decided = [s.seconds_sparse if s.decision == "sparse" else s.seconds_dense for s in sites]
    known = [seconds for seconds in [*dense, *decided] if seconds is not None]
    if not sites or len(known) < 2 * len(sites):
        return None
    spent = sum(known[len(sites) :])
    return sum(known[: len(sites)]) / spent if spent > 0 else None
