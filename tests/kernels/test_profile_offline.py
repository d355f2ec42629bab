"""Do the profile's kernels compile for GPUs that are not here: fit, hardly spill, tensor cores?

This file also runs as a program, in a process of its own: Triton is either interpreted or not,
for a whole process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166_912, 86: 101_376, 90: 232_448}  # what one program may use
LEVELS = (1, 2, 8)
CASES = {  # head_dim, dtype, causal, window
    "half": (128, "bfloat16", True, 0),
    "window": (128, "bfloat16", True, 300),
    "small": (64, "bfloat16", False, 0),
    "fp16": (128, "float16", True, 0),
    "odd": (80, "float16", False, 0),
    "wide": (256, "bfloat16", True, 0),
    "fp32": (64, "float32", True, 0),
    "wide fp32": (256, "float32", False, 0),
}
QUICK = [(80, "odd"), (90, "half")]


def compiled(arch, case, tmp_path):
    """Compiles the kernels of a case in a fresh process: what `measured` says, by kernel."""
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, str(arch), case]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == {"dense", *(f"walk {n}" for n in LEVELS)}
    assert max(kernel["shared"] for kernel in found.values()) <= SHARED_BYTES[arch]
    return found


@pytest.mark.parametrize(("arch", "case"), QUICK)
def test_fits(arch, case, tmp_path):
    found = compiled(arch, case, tmp_path)
    if arch >= 90:
        for name, kernel in found.items():
            assert kernel["HGMMA"] > 0, name
            # the sums of four levels leave no room for some scalars
            assert max(kernel["LDL"], kernel["STL"]) <= (8 if name == "walk 8" else 0), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("case", CASES)
def test_every_case_fits(arch, case, tmp_path):
    compiled(arch, case, tmp_path)


def compile_for(arch, head_dim, dtype, causal, window):
    """Compiles what a profile would launch, and measures it."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import profile_walk
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

        def __init__(self, name):
            self.kernel = getattr(profile_walk, name)
            setattr(profile_walk, name, self)

        def __getitem__(self, grid):
            def launch(*args, **options):
                name = f"walk {wanted}" if "LEVELS_HELD" in options else "dense"
                found[name] = measured(self.kernel.warmup(*args, grid=grid, **options))

            return launch

    found = {}
    driver.set_active(AbsentDriver())
    Compiled("dense_kernel")
    Compiled("walk_kernel")
    profile_walk.shared_memory_bytes = lambda device: SHARED_BYTES[arch]
    q = torch.zeros(1, 4, 512, head_dim, dtype=getattr(torch, dtype))
    call = profile_walk.call_of(
        q, q[:, :2], q[:, :2], torch.arange(4), Mask(causal, 0, window), 1.0, 128, 64
    )
    known = profile_walk.dense(call)
    shape = torch.zeros(1, 4, 4, dtype=torch.int32)
    for wanted in LEVELS:
        _, groups = profile_walk.grouped([-float(n) for n in range(wanted)])
        counts = shape.expand(len(groups), -1, -1, -1).contiguous()
        order = torch.zeros(*counts.shape, 8, dtype=torch.int32)
        profile_walk.walk(call, known, torch.tensor(groups), counts, order)
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
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "LDL", "STL")}
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for(int(sys.argv[1]), *CASES[sys.argv[2]])))
