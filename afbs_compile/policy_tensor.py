"""How does a site's policy reach the kernels? As one float32 row a query head."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as columns
from afbs_compile.policy import Head, Site

MODES = {"dense": columns.DENSE, "sparse": columns.SPARSE, "window": columns.WINDOWED}


def to_tensor(site: Site, device: torch.device | str = "cpu", rule: str = "tau") -> Tensor:
    """The policy of `site` as float32 [Hq, COLUMNS]; every head of a dense site is dense.

    Rule `budget` gives sparse heads without a budget the density that they were measured at.
    """
    dense = site.decision == "dense"
    heads = [replace(head, mode="dense") if dense else head for head in site.heads]
    return rows([limited(head) for head in heads] if rule == "budget" else heads, device)


def limited(head: Head) -> Head:
    """The head with a budget, its own or its density."""
    wanted = head.budget or head.density or None
    return replace(head, budget=wanted) if head.mode == "sparse" else head


def stacked(
    sites: Sequence[tuple[str, int]], known: Mapping[str, Site], rule: str = "tau"
) -> Tensor:
    """The policies of `sites` (name, query heads) as float32 [sites, Hmax, COLUMNS].

    A site without a policy, and what is beyond a site's heads, is dense.
    """
    most = max(heads for _, heads in sites)
    result = torch.zeros(len(sites), most, columns.COLUMNS)
    result[..., columns.MODE], result[..., columns.TAU] = columns.DENSE, 1.0
    for row, (name, heads) in enumerate(sites):
        if name in known:
            result[row, :heads] = to_tensor(known[name], rule=rule)
    return result


def with_budgets(tuned: Tensor, names: Sequence[str], budgets: Mapping[str, Any]) -> Tensor:
    """A copy of `stacked`'s result in which some sites' sparse heads have other budgets.

    Args:
        tuned: Policies of the sites `names`.
        names: Their order.
        budgets: By site, a fraction for all of its heads or one for each.
    """
    result = tuned.clone()
    for name, budget in budgets.items():
        site = result[names.index(name)]
        wanted = torch.full_like(site[:, columns.BUDGET], 0.0)
        given = torch.as_tensor(budget, dtype=torch.float32)
        wanted[: given.numel() if given.dim() else None] = given
        sparse = site[:, columns.MODE] == columns.SPARSE
        site[:, columns.BUDGET] = torch.where(sparse, wanted, site[:, columns.BUDGET])
    return result


def rows(heads: Iterable[Head], device: torch.device | str = "cpu") -> Tensor:
    """The policy of some heads as float32 [H, COLUMNS]."""
    return torch.tensor([row(head) for head in heads], dtype=torch.float32, device=device)


def row(head: Head) -> list[float]:
    """The columns of one head."""
    values = [0.0] * columns.COLUMNS
    values[columns.MODE] = MODES[head.mode]
    values[columns.TAU] = head.tau
    values[columns.THETA] = head.theta
    values[columns.LAMBDA] = -math.inf if head.lambda_ is None else head.lambda_
    values[columns.WINDOW] = float(head.window)
    values[columns.SINK] = float(head.sink)
    values[columns.NEIGHBOURS] = float(head.neighbours)
    values[columns.BUDGET] = head.budget or 0.0
    return values
