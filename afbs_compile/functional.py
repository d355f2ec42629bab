"""Attention with SDPA's signature: the same engine, without a compiled model.

For code that calls attention itself. A model is better served by `torch.compile(backend="afbs")`
or, with Hugging Face, by `afbs_compile.integrations`: they tune, this function does not.
"""

import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import afbs_compile.kernels.op  # noqa: F401  registers the op
from afbs_compile import logs
from afbs_compile.calls import refusal
from afbs_compile.kernels.on_gpu import kernel_of
from afbs_compile.options import MIN_LENGTH
from afbs_compile.policy import Policy
from afbs_compile.policy_op import fixed_source, site_at, site_source
from afbs_compile.report import JOURNAL, SiteReport

TAU = 0.95  # of the mass, where nothing else is said


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy | str | os.PathLike[str] | None = None,
    site: str | None = None,
    tau: float | None = None,
    selector: str = "sub8",
    compensation: str = "none",
    min_length: int = MIN_LENGTH,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, block-sparse where it can be.

    What cannot be done exactly goes to SDPA, and `afbs_compile.explain()` counts why. Works under
    `torch.compile` without a graph break, and under autograd where there is a backward (GPUs).

    Args:
        query: `[B, Hq, Lq, D]`.
        key: `[B, Hkv, Lk, D]`.
        value: `[B, Hkv, Lk, D]`.
        attn_mask: As in SDPA; boolean ones are kept exactly, calls with float ones stay SDPA.
        dropout_p: As in SDPA; a call with dropout stays SDPA.
        is_causal: As in SDPA: query i sees keys 0 to i.
        scale: As in SDPA.
        enable_gqa: As in SDPA; must be set if there are fewer key than query heads.
        policy: A policy, or a file with one. Then `site` is needed.
        site: The site of the policy that this call is; without a policy a name for `explain()`.
        tau: Without a policy: the share of every query's mass that is kept, in [0, 1]. What that
            does to the output is not measured.
        selector: How block scores are made.
        compensation: What stands for a block that is left out.
        min_length: Calls with fewer queries are SDPA.

    Returns:
        `[B, Hq, Lq, D]`.

    Raises:
        ValueError: Policy and site do not fit together, or both policy and tau are given.
        PolicyError: The policy file cannot be used.
    """
    source = source_of(policy, site, tau)
    name = site or "attention"
    reason = refusal(
        query, key, value, dropout_p=dropout_p, enable_gqa=enable_gqa,
        min_length=min_length, compensation=compensation, masked=attn_mask is not None,
    )  # fmt: skip
    if attn_mask is not None and (is_causal or attn_mask.dtype != torch.bool):
        reason = "both attn_mask and is_causal" if is_causal else "additive float mask"
    elif reason is None and policy is not None and not torch.compiler.is_compiling():
        reason = unsettled(policy, name, key.shape[2], query.shape[1])
    if reason is not None:
        note(name, "refused", reason)
        return sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    note(name, "sparse", None, source if policy is None else None, kernel(query))
    rows = torch.ops.afbs.policy_of(key.detach(), source, query.shape[1])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.afbs.attention(
        query, key, value, rows, is_causal, 0, 0, scale, selector, min_length, compensation,
        None, None, None, attn_mask,
    )  # fmt: skip
    return out


def kernel(query: Tensor) -> str | None:
    """The kernel that a call takes; not asked for while a graph is traced."""
    if torch.compiler.is_compiling():
        return None
    return kernel_of(query.device, query.dtype, query.shape[3])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def source_of(
    policy: Policy | str | os.PathLike[str] | None, site: str | None, tau: float | None
) -> str:
    """The name under which `afbs::policy_of` finds the thresholds."""
    if policy is None:
        if tau is None:
            logs.warn_once(
                f"attention() without a policy keeps tau={TAU} of the mass in every head; what "
                "that does to the output is not measured. Pass policy= and site=, or tau=."
            )
        share = TAU if tau is None else tau
        if not 0 <= share <= 1:
            raise ValueError(f"tau is {tau!r}; give a number from 0 to 1")
        return fixed_source(share)
    if site is None or tau is not None:
        raise ValueError("with policy= give site=, and no tau=: the policy says what is kept")
    return site_source(read(policy), site)


def read(policy: Policy | str | os.PathLike[str]) -> Policy:
    """The policy itself; a file is read again only when it changes."""
    if isinstance(policy, Policy):
        return policy
    path = Path(policy).expanduser()
    return read_at(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=16)
def read_at(path: Path, changed: int) -> Policy:
    """The policy in a file as it was at a time."""
    return Policy.read(path)


def unsettled(
    policy: Policy | str | os.PathLike[str], name: str, length: int, heads: int
) -> str | None:
    """Why the policy leaves a call dense, or None if it does not."""
    site = site_at(read(policy), name, length)
    if site is None:
        return f"the policy has no tuning for {length} tokens"
    if len(site.heads) != heads:
        return f"the policy is for {len(site.heads)} heads, the call has {heads}"
    return (site.reason or "dense in the policy") if site.decision == "dense" else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def note(
    name: str,
    decision: str,
    reason: str | None,
    form: str | None = None,
    kernel: str | None = None,
) -> None:
    """Count a call; while a graph is traced, the trace counts as one."""
    fixed = f"fixed: {form}, not measured" if form else None
    JOURNAL.add_call(SiteReport(name, decision, reason, decided_by=fixed, kernel=kernel))
