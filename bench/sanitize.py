"""Small calls of every kernel, for NVIDIA's memory checker.

`compute-sanitizer --tool memcheck python bench/sanitize.py` (also `--tool racecheck`): odd
lengths, repeated key heads, a causal mask and none, dense, sparse and windowed heads; selection,
forward and backward. Without the checker it still compares every output with the fp32 reference.
"""

import math
import os
import sys
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # one allocation a tensor: overruns are seen

import torch
from torch import Tensor

from afbs_compile.kernels import dispatch, on_gpu, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

BAR = 2e-2  # relative, in bf16
HEADS, KV_HEADS = 6, 2
SITES = (  # queries, keys, mask
    (257, 257, Mask(True)),
    (129, 321, Mask(True, 192)),
    (130, 200, Mask()),
    (257, 257, Mask(True, 0, 70)),
)


def policy(device: str) -> Tensor:
    """Dense, sparse and windowed heads in turn."""
    rows = torch.zeros(HEADS, col.COLUMNS)
    modes = (col.DENSE, col.SPARSE, col.WINDOWED)
    rows[:, col.MODE] = torch.tensor([modes[h % 3] for h in range(HEADS)])
    rows[:, col.TAU], rows[:, col.THETA], rows[:, col.LAMBDA] = 0.5, -1.0, -math.inf
    rows[:, col.WINDOW], rows[:, col.SINK], rows[:, col.NEIGHBOURS] = 60, 5, 1
    return rows.to(device)


def inputs(site: tuple[int, int, Mask], dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v over `[B, L, H, D]` memory."""
    torch.manual_seed(0)
    sizes = ((HEADS, site[0]), (KV_HEADS, site[1]), (KV_HEADS, site[1]))
    q, k, v = (
        torch.randn(1, length, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for heads, length in sizes
    )
    return q, k, v


def differ(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    wanted = wanted.detach().float()
    return float((found.float() - wanted).norm() / wanted.norm())


def run(site: tuple[int, int, Mask], dim: int, selector: str, device: str) -> dict[str, float]:
    """Errors of one call: output, and gradients where the kernels have a backward."""
    from afbs_compile.kernels import triton_forward, triton_selection

    q, k, v = inputs(site, dim, device)
    rows = policy(device)
    block_m, block_n = dispatch.block_sizes("cuda")
    blocks: dict[str, Any] = {"block_m": block_m, "block_n": block_n}
    call: dict[str, Any] = {"mask": site[2], "scale": dim**-0.5}
    counts, indices = triton_selection.select(q, k, rows, selector=selector, **call, **blocks)
    qf, kf, vf = leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    wanted, _ = reference.forward(qf, kf, vf, counts, indices, rows, **call, **blocks)
    errors = {}
    chosen = on_gpu.gpu_forward(q, k, v, **blocks)
    for kernel in {chosen, triton_forward.forward}:
        o, lse = kernel(q, k, v, counts, indices, rows, **call, **blocks)
        errors[f"{kernel.__module__.rpartition('.')[2]}"] = differ(o, wanted)
    if differentiate := getattr(dispatch, "backward", None):
        do = torch.randn_like(o)
        found = differentiate(do, q, k, v, o, lse, counts, indices, rows, **call)
        grads = torch.autograd.grad(wanted, leaves, do.float())
        names = ("dq", "dk", "dv")
        errors |= {n: differ(a, b) for n, a, b in zip(names, found, grads, strict=True)}
    return errors


def main(device: str = "cuda") -> int:
    """Run all; exit code 1 if a result is wrong, or there is no CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here; run this on a machine with an NVIDIA GPU\n")
        return 1
    if not hasattr(dispatch, "backward"):
        print("backward left out: these kernels have none")
    wrong = []
    for site in SITES:
        for dim, selector in ((64, "sub8"), (128, "sub4"), (96, "mean")):
            errors = run(site, dim, selector, device)
            wrong += [name for name, e in errors.items() if not e <= BAR]
            print(site, dim, selector, {name: f"{e:.1e}" for name, e in errors.items()})
    print(f"WRONG: {', '.join(wrong)} differ by more than {BAR:.0e}" if wrong else "right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
