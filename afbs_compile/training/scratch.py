"""Which policy does a model have that is trained from scratch? Budgets, and nothing tuned.

Random weights have nothing to tune on. With a budget none is needed: a sparse head keeps the best
blocks up to a fixed share, whatever its content, and the step's cost is known before the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from afbs_compile.identity import model_key, rows_of
from afbs_compile.policy import Head, Policy, Site, Tuning, bucket_of
from afbs_compile.versions import device_name, versions
from afbs_compile.weights import site_keys

SHORTEST = 128  # tokens of the first tuning
TAU = 0.5  # of a head that keeps a budget: never asked


@dataclass(frozen=True, slots=True)
class Attention:
    """What the attention of a module is like.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        mask: As a policy names it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "causal"


def budget_policy(
    model: nn.Module,
    sites: Mapping[str, Attention],
    budget: float,
    longest: int,
    dtype: torch.dtype | None = None,
) -> Policy:
    """A policy under which every head keeps `budget` of its visible blocks.

    Write it to a file (`to_json`) and give that as `options={"policy": …}`, for the whole model or
    for its blocks alike; make it before the model is wrapped or trained, since layers are found by
    their first weights. `afbs_compile.set_budget` changes budgets from there.

    Args:
        model: With its initial weights.
        sites: By path of the module that calls attention.
        budget: In (0, 1].
        longest: Tokens; longer calls stay dense.
        dtype: Of the parameters in the compiled graph, where it is not the model's own: FSDP2's
            `MixedPrecisionPolicy.param_dtype`.

    Raises:
        ValueError: There is no site, a module has no weights of its own to be found by, or a
            number is out of range.
    """
    if not sites or longest < 1:
        raise ValueError(f"{len(sites)} sites, longest is {longest}: need 1 or more of both")
    found = {name: site_of(model, name, site, budget, dtype) for name, site in sites.items()}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    where = device_name(next(model.parameters()).device)
    tunings: list[Tuning] = []
    length = SHORTEST
    while not tunings or tunings[-1].length < longest:
        tunings.append(
            Tuning(bucket_of(length), length, {}, True, 0, 0.0, 0.0, made, where, versions(), (),
                   found)
        )  # fmt: skip
        length *= 2
    named = [(name, cast(weight, dtype)) for name, weight in model.named_parameters()]
    return Policy(model_key(named), type(model).__name__, tuple(tunings))


def site_of(
    model: nn.Module, name: str, site: Attention, budget: float, dtype: torch.dtype | None
) -> Site:
    """One site, with the key of its weights.

    Raises:
        ValueError: Its module has no weights.
    """
    weights = [(n, cast(w, dtype)) for n, w in model.get_submodule(name).named_parameters()]
    if not weights:
        raise ValueError(
            f"{name!r} has no weights to be told by; name the module whose forward calls attention"
        )
    key = site_keys(rows_of(weights), ["function"])["function"]
    heads = (Head("sparse", TAU, budget=budget),) * site.heads
    return Site(name, heads, site.kv_heads, site.head_dim, site.mask, "sparse", weights=key)


def cast(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as the graph sees it."""
    return weight.detach() if dtype is None else weight.detach().to(dtype)
