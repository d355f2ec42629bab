"""Do the Triton kernels compile for GPUs that are not here, within their shared memory?

The interpreter checks no types or layouts. This file also runs as a program, in a process of its
own: Triton is either interpreted or not, for a whole process.
"""

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 166_912, 86: 101_376, 90: 232_448}  # what one program may use
CASES = {  # head_dim, dtype, block_m, block_n, causal, selector, parts of a data mask
    "half": (128, "bfloat16", 128, 64, True, "sub8"),
    "odd": (80, "float16", 64, 64, False, "sub4"),
    "fp32": (64, "float32", 128, 64, True, "mean"),
    "wide": (256, "bfloat16", 128, 64, True, "mean"),
    "wide fp32": (256, "float32", 128, 64, False, "sub8"),  # wider blocks nobody launches
    "largest": (128, "bfloat16", 128, 128, True, "sub4"),
    "padded": (128, "bfloat16", 128, 64, True, "sub8", "keys"),
    "packed": (80, "float16", 128, 64, True, "mean", "keys segments"),
    "elements": (64, "float32", 128, 64, False, "sub4", "elements"),
    "biased": (64, "float16", 128, 64, True, "sub8", "bias"),
    "biased fp32": (128, "float32", 128, 64, False, "sub8", "bias"),
}
QUICK = [(80, "odd"), (90, "half"), (90, "padded")]
OTHERS = [(arch, case) for arch in SHARED_BYTES for case in CASES if (arch, case) not in QUICK]


def shared_memory(arch, case, tmp_path):
    """Compiles all kernels of a case in a fresh process: `{kernel: bytes of shared memory}`."""
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, str(arch), case]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(("arch", "case"), QUICK)
def test_compiles_and_fits(arch, case, tmp_path):
    used = shared_memory(arch, case, tmp_path)
    masks = {"states_kernel"} if len(CASES[case]) > 6 else set()
    masks |= {"first_kernel"} if CASES[case][-1] == "bias" else set()
    assert used.keys() == masks | {
        "pool_kernel", "score_kernel", "pick_kernel", "forward_kernel", "columns_kernel",
        "merge_kernel", "decode_kernel", "join_kernel",
    }  # fmt: skip
    assert max(used.values()) <= SHARED_BYTES[arch]
    assert used["forward_kernel"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), OTHERS)
def test_every_case_compiles_and_fits(arch, case, tmp_path):
    test_compiles_and_fits(arch, case, tmp_path)


def compile_for(arch, case):
    """Compiles what selection and attention would launch; returns the shared memory of each."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import (
        triton_compensation,
        triton_decode,
        triton_forward,
        triton_mask,
        triton_pool,
        triton_scores,
        triton_selection,
    )
    from afbs_compile.kernels.data_mask import DataMask
    from afbs_compile.kernels.geometry import Mask

    class AbsentDriver:
        """What Triton asks of a driver to compile a kernel, for a device that is not here."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    class Compiled:
        """Stands in for a kernel: a launch compiles it and notes its shared memory."""

        def __init__(self, module, name):
            self.kernel, self.name = getattr(module, name), name
            setattr(module, name, self)

        def __getitem__(self, grid):
            return lambda *args, **options: used.update(
                {self.name: self.kernel.warmup(*args, grid=grid, **options).metadata.shared}
            )

    used = {}
    driver.set_active(AbsentDriver())
    Compiled(triton_pool, "pool_kernel")
    Compiled(triton_scores, "score_kernel")
    Compiled(triton_selection, "pick_kernel")
    Compiled(triton_forward, "forward_kernel")
    Compiled(triton_mask, "states_kernel")
    Compiled(triton_mask, "first_kernel")
    Compiled(triton_compensation, "columns_kernel")
    Compiled(triton_compensation, "merge_kernel")
    Compiled(triton_decode, "decode_kernel")
    Compiled(triton_decode, "join_kernel")
    for module in (triton_scores, triton_forward, triton_decode):
        module.shared_memory_bytes = lambda device: SHARED_BYTES[arch]
    head_dim, dtype, block_m, block_n, causal, selector, *parts = CASES[case]
    q = torch.zeros(1, 2, 256, head_dim, dtype=getattr(torch, dtype))
    k, policy = q[:, :1], torch.zeros(2, 8)
    site = {"mask": Mask(causal), "scale": 1.0, "block_m": block_m, "block_n": block_n}
    ids, rows = torch.zeros(1, 256, dtype=torch.long), torch.ones(1, 1, 256, 256).bool()
    made = {
        "keys": ids == 0,
        "q_segments": ids,
        "k_segments": ids,
        "elements": rows,
        "bias": q @ q.mT,
    }
    wanted = {n: x for n, x in made.items() if parts and n.split("_")[-1] in parts[0]}
    data = DataMask(**wanted) if parts else None
    counts, indices = triton_selection.select(q, k, policy, selector=selector, data=data, **site)
    results = triton_forward.forward(q, k, k, counts, indices, policy, data=data, **site)
    lists = counts.zero_(), indices.zero_()  # nobody has written them; these are read on the host
    triton_compensation.compensate(*results, q, k, k, *lists, policy, **site)
    cache, places = k[:, 0], torch.zeros(2, 1, dtype=torch.int32)
    lengths = torch.zeros(1, dtype=torch.int32)
    work = torch.zeros(3, dtype=torch.int32)
    triton_decode.decode(q[:, :, :1], cache, cache, *places, lengths, work, scale=1.0, splits=8)
    return used


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for(int(sys.argv[1]), sys.argv[2])))
