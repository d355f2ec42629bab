"""How does a site's policy reach the kernels? As one float32 row a query head."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as columns
from afbs_compile.policy import Head, Site

MODES = {"dense": columns.DENSE, "sparse": columns.SPARSE, "window": columns.WINDOWED}


def to_tensor(site: Site, device: torch.device | str = "cpu") -> Tensor:
    """The policy of `site` as float32 [Hq, COLUMNS]; every head of a dense site is dense."""
    dense = site.decision == "dense"
    return rows([replace(head, mode="dense") if dense else head for head in site.heads], device)


def stacked(sites: Sequence[tuple[str, int]], known: Mapping[str, Site]) -> Tensor:
    """The policies of `sites` (name, query heads) as float32 [sites, Hmax, COLUMNS].

    A site without a policy, and what is beyond a site's heads, is dense.
    """
    most = max(heads for _, heads in sites)
    result = torch.zeros(len(sites), most, columns.COLUMNS)
    result[..., columns.MODE], result[..., columns.TAU] = columns.DENSE, 1.0
    for row, (name, heads) in enumerate(sites):
        if name in known:
            result[row, :heads] = to_tensor(known[name])
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
    return values
