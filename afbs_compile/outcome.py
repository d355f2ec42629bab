"""What became of the sites of a layer? Lines for the report."""

from collections.abc import Sequence
from dataclasses import replace

from afbs_compile.calibrate import describe
from afbs_compile.kernels.on_gpu import kernel_of
from afbs_compile.passes.rewrite import Site
from afbs_compile.passes.sites import value
from afbs_compile.policy import Tuning
from afbs_compile.report import JOURNAL, SiteReport
from afbs_compile.weights import Layer

KEY_SHOWN = 8  # digits of a layer's key that tell it apart for people


def report(sites: Sequence[Site], found: Tuning | str, layer: Layer, first: bool) -> None:
    """Note what a tuning does with some sites, or why there is none.

    Sites of further layers of a graph go by their names in the model's policy, if they have any.
    """
    for site in sites:
        if isinstance(found, str):
            line = SiteReport(site.name, "dense", found)
        else:
            line = site_report(site, found)
        name = layer.names.get(site.name, site.name)
        if not first and name == site.name:
            name = f"{layer.key[:KEY_SHOWN]}:{name}"
        JOURNAL.add_sites([replace(line, name=name)])


def site_report(site: Site, tuning: Tuning) -> SiteReport:
    """What became of a tuned site."""
    policy = tuning.sites.get(site.name)
    query = value(site.call.query)
    known = SiteReport(
        site.name, "dense", "not in the policy", describe(site),
        site.heads, site.kv_heads, site.head_dim, tuning.length,
        kernel=kernel_of(query.device, query.dtype, site.head_dim, bool(site.data)),
    )  # fmt: skip
    if policy is None:
        return known
    densities = [h.density for h in policy.heads if h.density is not None]
    errors = [h.error for h in policy.heads if h.error is not None]
    speeds = (policy.seconds_dense, policy.seconds_sparse)
    return replace(
        known,
        decision=policy.decision,
        reason=policy.reason,
        density=sum(densities) / len(densities) if densities else None,
        error=max(errors, default=None),
        speedup=speeds[0] / speeds[1] if speeds[0] and speeds[1] else None,
    )
