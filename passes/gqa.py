"""Undo `repeat_kv`: find the key/value heads behind their copies.

Models without grouped-query support in SDPA repeat every key/value head `groups` times. The
kernels read each head once, so the copies are dead weight.
"""

import operator

import torch
from torch.fx import Node

from afbs_compile.passes.sites import value

RESHAPES = {"reshape", "view", "flatten"}


def undo(node: Node, heads: int) -> Node:
    """The tensor `[B, Hkv, L, D]` of which `node` `[B, heads, L, D]` is a repetition, else `node`.

    Recognised: `x[:, :, None].expand(...).reshape(...)` (Hugging Face) and
    `x.repeat_interleave(groups, 1)`.
    """
    return behind_interleave(node, heads) or behind_expand(node, heads) or node


def behind_interleave(node: Node, heads: int) -> Node | None:
    """Source of `repeat_interleave` along the head axis with an equal count for every head."""
    if node.target not in ("repeat_interleave", torch.repeat_interleave) or node.kwargs.keys() - {
        "dim",
        "repeats",
    }:
        return None
    source = node.args[0]
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not (isinstance(source, Node) and isinstance(repeats, int) and dim in (1, -3)):
        return None
    return source if divides(source, heads, repeats) else None


def behind_expand(node: Node, heads: int) -> Node | None:
    """Source of `x[:, :, None].expand(B, Hkv, groups, L, D).reshape(B, Hkv * groups, L, D)`."""
    chain = [node]
    for _ in range(2):
        previous = chain[-1].args[0] if chain[-1].args else None
        if not isinstance(previous, Node):
            return None
        chain.append(previous)
    reshape, expand, lift = chain
    if (
        reshape.target not in RESHAPES | {torch.reshape, torch.flatten}
        or expand.target != "expand"
    ):
        return None
    source = lift.args[0] if lift.args else None
    if not (isinstance(source, Node) and is_lift(lift)):
        return None
    wide = value(expand)
    batch, kv_heads, length, dim = value(source).shape
    if wide.dim() != 5 or wide.shape[2] * kv_heads != heads:
        return None
    same = (wide.shape[0], wide.shape[1], wide.shape[3], wide.shape[4]) == (
        batch, kv_heads, length, dim,
    )  # fmt: skip
    return source if same and divides(source, heads, wide.shape[2]) else None


def is_lift(node: Node) -> bool:
    """Does the node insert an axis after the heads: `x[:, :, None]` or `x.unsqueeze(2)`?"""
    if node.target is operator.getitem:
        index = node.args[1]
        everything = slice(None, None, None)
        if not isinstance(index, tuple) or len(index) < 3:
            return False
        rest = [*index[:2], *index[3:]]
        return index[2] is None and all(i == everything or i is Ellipsis for i in rest)
    return node.target in ("unsqueeze", torch.unsqueeze) and node.args[1] in (2, -3)


def divides(source: Node, heads: int, groups: int) -> bool:
    """Do `groups` copies of the source's heads make `heads`?"""
    shape = value(source).shape
    return len(shape) == 4 and shape[1] * groups == heads
