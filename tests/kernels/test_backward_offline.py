"""Do the backward's kernels compile for GPUs that are not here: fit, no spills, tensor cores?

Needs no GPU: Triton brings ptxas and cuobjdump. This file also runs as a program, in a process of
its own: Triton is either interpreted or not, for a whole process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166_912, 86: 101_376, 90: 232_448}  # what one program may use
KERNELS = {"mark_kernel", "collect_kernel", "statistics_kernel", "dq_kernel", "dkdv_kernel"}
FAST = [  # head_dim, dtype, causal, kv_heads (of 4 query heads): what training runs
    (head_dim, dtype, causal, kv_heads)
    for head_dim in (64, 128)
    for dtype in ("bfloat16", "float16")
    for causal in (False, True)
    for kv_heads in (4, 2)
]
QUICK = (128, "bfloat16", True, 4)
MASKS = ["keys", "segments", "elements", "bias"]
ODD = [(80, "float16", True, 2), (64, "float32", True, 4), (256, "bfloat16", False, 2),
       (256, "float32", True, 4), (128, "bfloat16", True, 2)]  # fmt: skip


def compiled(arch, case, tmp_path):
    """Compiles all kernels of a case in a fresh process: what `measured` says, by kernel."""
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, str(arch), json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == KERNELS
    assert max(kernel["shared"] for kernel in found.values()) <= SHARED_BYTES[arch]
    return found


def check_hopper(case, tmp_path):
    found = compiled(90, case, tmp_path)
    for name in ("dq_kernel", "dkdv_kernel"):
        assert found[name]["HGMMA"] > 0, name
        # between its two loops dk and dv leave no room for some scalars, which wait in memory
        assert found[name]["spills in loops"] <= 4, name
        assert found[name]["LDL"] <= 32, name
    assert found["dq_kernel"]["LDL"] == found["dq_kernel"]["STL"] == 0
    assert found["dkdv_kernel"]["UTMALDG"] > 0
    # two programs share a processor: one waits for its products while the other computes
    assert 2 * found["dkdv_kernel"]["shared"] <= SHARED_BYTES[90]


def test_no_spills_and_tensor_cores(tmp_path):
    check_hopper(QUICK, tmp_path)


@pytest.mark.parametrize(
    "mask", ["keys", *(pytest.param(mask, marks=pytest.mark.slow) for mask in MASKS[1:])]
)
def test_masks_have_room(mask, tmp_path):
    found = compiled(90, [*QUICK, mask], tmp_path)
    for name in ("dq_kernel", "dkdv_kernel"):
        assert found[name]["HGMMA"] > 0, name
        assert found[name]["spills in loops"] <= (4 if mask == "keys" else 40), name
    assert found["dq_kernel"]["LDL"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FAST if case != QUICK])
def test_every_fast_case(case, tmp_path):
    check_hopper(case, tmp_path)


@pytest.mark.parametrize(("arch", "case"), [(80, ODD[0])])
def test_fits(arch, case, tmp_path):
    compiled(arch, case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("case", ODD)
def test_every_case_fits(arch, case, tmp_path):
    compiled(arch, case, tmp_path)


def compile_for(arch, head_dim, dtype, causal, kv_heads, mask=None):
    """Compiles what `backward` would launch, and measures it."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import boxes, transpose, triton_backward
    from afbs_compile.kernels.data_mask import gathered
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
        """Stands in for a kernel: a launch compiles it and measures the result."""

        def __init__(self, module, name):
            self.kernel, self.name = getattr(module, name), name
            setattr(module, name, self)

        def __getitem__(self, grid):
            return lambda *args, **options: found.update(
                {self.name: measured(self.kernel.warmup(*args, grid=grid, **options))}
            )

    found = {}
    driver.set_active(AbsentDriver())
    for name in ("mark_kernel", "collect_kernel"):
        Compiled(transpose, name)
    for name in ("statistics_kernel", "dq_kernel", "dkdv_kernel"):
        Compiled(triton_backward, name)
    triton_backward.shared_memory_bytes = lambda device: SHARED_BYTES[arch]
    boxes.has_copy_engine = lambda device: arch >= 90
    q = torch.zeros(1, 512, 4, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
    k = q[:, :kv_heads]
    counts, indices = (torch.zeros(1, 4, 4, *n, dtype=torch.int32) for n in ((), (8,)))
    keys, segments = torch.ones(1, 512, dtype=torch.bool), torch.zeros(1, 512, dtype=torch.long)
    square = keys.expand(512, 512), torch.zeros(1, 4, 512, 512, dtype=q.dtype)
    parts = {"keys": [keys], "segments": [keys, segments, segments],
             "elements": [None, None, None, square[0].contiguous()],
             "bias": [None, None, None, None, square[1]]}.get(mask, [])  # fmt: skip
    lse = torch.zeros((2, 1, 4, 512) if mask == "bias" else (1, 4, 512))
    saved = q, lse, counts, indices, torch.zeros(4, 8)
    site = {"mask": Mask(causal), "scale": 1.0, "block_m": 128, "block_n": 64}
    triton_backward.backward(q, q, k, k, *saved, data=gathered(parts, (512, 512)), **site)
    return found


def measured(kernel):
    """Shared memory, and how often each instruction of interest occurs."""
    import triton

    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code, usage = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("--dump-sass", "--dump-resource-usage")
    )
    names = ("HGMMA", "HMMA", "LDL", "STL", "UTMALDG")
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in names}
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "spills in loops": spills_in_loops(code),
    }


def spills_in_loops(code):
    """Loads and stores of spilled registers in the innermost loops that use tensor cores.

    A loop ends with a jump back on a condition; a plain jump back ends a wait that was moved.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    found = ((at, re.match(r"@.*\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in lines)
    jumps = [(int(match[1], 16), at) for at, match in found if match]
    bodies = [
        (start, end) for start, end in jumps
        if any("HGMMA" in text for at, text in lines if start <= at <= end)
    ]  # fmt: skip
    inner = [
        (start, end) for start, end in bodies
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in bodies)
    ]  # fmt: skip
    return sum(
        bool(re.search(r"\b(LDL|STL)\b", text))
        for at, text in lines
        for start, end in inner
        if start <= at <= end
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for(int(sys.argv[1]), *json.loads(sys.argv[2]))))
