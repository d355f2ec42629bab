"""Attention on a GPU: our kernels against cuDNN's SDPA. `python bench/attention.py [--quick]`."""

import argparse
import math

import torch
from harness import interleaved, ratio, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from afbs_compile.kernels import dispatch, lists
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible

SHAPES = [
    (8192, False),
    (16384, False),
    (32768, False),
    (8192, True),
    (16384, True),
    (32768, True),
]
KEPT = (1.0, 0.25, 0.1)
HEADS = 32


def policy(tau: float) -> torch.Tensor:
    """All heads sparse at one tau."""
    rows = torch.zeros(HEADS, col.COLUMNS)
    rows[:, col.MODE], rows[:, col.TAU], rows[:, col.THETA] = col.SPARSE, tau, -1.0
    rows[:, col.LAMBDA], rows[:, col.SINK], rows[:, col.NEIGHBOURS] = -math.inf, 64, 2
    return rows.cuda()


def random_lists(
    length: int, causal: bool, kept: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Random blocks plus the diagonal, and the share of visible blocks that they are."""
    block_m, block_n = dispatch.block_sizes("cuda")
    q, k = (Blocks.of(length, b, torch.device("cuda")) for b in (block_m, block_n))
    visible = head_visible(Mask(causal), policy(1.0)[:1], q, k)
    diagonal = (k.last >= q.first[:, None]) & (k.first <= q.last[:, None])
    wanted = torch.rand(1, HEADS, len(q), len(k), device="cuda") < kept
    keep = (wanted | diagonal) & visible
    return *lists.from_keep(keep), (keep.sum() / (visible.sum() * HEADS)).item()


def tau_for(q: torch.Tensor, k: torch.Tensor, site: dict, kept: float) -> tuple[float, float]:
    """The tau at which selection keeps about `kept`, by bisection, and what it keeps."""
    from afbs_compile.kernels import triton_selection

    low, high, share = 0.0, 1.0, 1.0
    block_m, block_n = dispatch.block_sizes("cuda")
    qb, kb = (Blocks.of(q.shape[2], b, q.device) for b in (block_m, block_n))
    visible = head_visible(site["mask"], policy(1.0)[:1], qb, kb).sum() * HEADS
    for _ in range(12):
        tau = (low + high) / 2
        counts, _ = triton_selection.select(q, k, policy(tau), selector="sub8",
                                            block_m=block_m, block_n=block_n, **site)  # fmt: skip
        share = (counts.sum() / visible).item()
        low, high = (tau, high) if share < kept else (low, tau)
    return tau, share


def rows_of(length: int, causal: bool, dim: int, repeats: int) -> list[dict]:
    """All rows of one shape."""
    from afbs_compile.kernels import triton_forward, triton_selection

    torch.manual_seed(0)
    shape = (1, length, HEADS, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
               for _ in range(3))  # fmt: skip
    site = {"mask": Mask(causal), "scale": dim**-0.5}
    block_m, block_n = dispatch.block_sizes("cuda")
    blocks = {"block_m": block_m, "block_n": block_n}

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    common = {"head_dim": dim, "length": length, "causal": causal, "heads": HEADS,
              "kv_heads": HEADS, "batch": 1, "dtype": "bfloat16", "ratio_flex": None,
              "ratio_fa4": None}  # fmt: skip
    chosen_forward = dispatch.gpu_forward(q, k, v, **blocks)
    kernel = "gluon" if "gluon" in chosen_forward.__module__ else "triton"
    rows = []
    for kept in KEPT:
        counts, indices, share = random_lists(length, causal, kept)
        everything = policy(1.0)
        tau, selected = (1.0, 1.0) if kept == 1 else tau_for(q, k, site, kept)
        chosen = policy(tau)
        calls = {
            "cudnn": cudnn,
            "portable": lambda c=counts, i=indices, p=everything: triton_forward.forward(
                q, k, v, c, i, p, **site, **blocks
            ),
            "forward": lambda c=counts, i=indices, p=everything: chosen_forward(
                q, k, v, c, i, p, **site, **blocks
            ),
            "selection": lambda p=chosen: triton_selection.select(
                q, k, p, selector="sub8", **site, **blocks
            ),
            "whole_op": lambda p=chosen: dispatch.attention(q, k, v, p, selector="sub8", **site),
        }
        times = interleaved(calls, repeats)
        for case in ("portable", "forward", "selection", "whole_op"):
            median, spread = ratio(times["cudnn"], times[case])
            row = common | {
                "case": "forward" if case == "portable" else case,
                "kernel": kernel if case in ("forward", "whole_op") else "triton",
                "kept": share if case in ("forward", "portable") else selected,
                "ours_ms": sorted(times[case])[repeats // 2],
                "cudnn_ms": sorted(times["cudnn"])[repeats // 2],
                "ratio_cudnn": median, "spread": spread,
            }  # fmt: skip
            rows.append(row)
            print(f"d{dim} {length} {'causal' if causal else 'full  '} {case:9s} "
                  f"kept {row['kept']:.3f} ours {row['ours_ms']:.3f} ms cudnn "
                  f"{row['cudnn_ms']:.3f} ms x{median:.2f} ±{spread:.2f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Run the grid and store it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="8k and 16k, d=128 only")
    quick = parser.parse_args().quick
    shapes = [s for s in SHAPES if s[0] <= 16384] if quick else SHAPES
    rows = [r for n, causal in shapes for r in rows_of(n, causal, 128, 7)]
    if not quick:
        rows += [r for causal in (False, True) for r in rows_of(16384, causal, 64, 7)]
    print(write("attention", rows))


if __name__ == "__main__":
    main()
