"""Does the Gluon kernel compile for Hopper without spilling, and with tensor-core instructions?

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

from afbs_compile.kernels import gluon_shim

SHARED_BYTES = 232_448  # what one program may use on sm_90
REGISTERS = 168  # of a thread at entry: 65,536 for 3 warpgroups of 128
CASES = [
    (head_dim, dtype, causal)
    for head_dim in (64, 128)
    for dtype in ("bfloat16", "float16")
    for causal in (False, True)
]
LOOPS = 2 * 3  # two consumers: steps with a mask, without one, and steps that may be skipped
QUICK = (128, "bfloat16", True)


def check(case, tmp_path):
    """Compiles a case in a fresh process and looks at its machine code."""
    pytest.importorskip("triton.backends.nvidia")
    if gluon_shim.unusable_triton() is not None:
        pytest.skip(gluon_shim.unusable_triton())
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # two consumers, each with three loop bodies, a first Q·K, a last P·V; 16 deep an instruction
    per_step = (case[0] + 128) // 16
    assert found["HGMMA"] == 2 * 4 * per_step
    assert found["loops"] == LOOPS
    # nothing spills in a loop over steps; a few scalars of the set-up may, once a tile
    assert found["spills_in_loops"] == 0
    assert found["STL"] <= 8
    # half-precision weights cross the loop in pairs: taken apart they cost two PRMT a pair
    assert found["fewest_permutations"] == 0
    assert found["UTMALDG"] > 0
    assert found["registers"] <= REGISTERS
    assert found["shared"] <= SHARED_BYTES


def test_no_spills_and_tensor_cores(tmp_path):
    check(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != QUICK])
def test_every_case(case, tmp_path):
    check(case, tmp_path)


def compile_for_hopper(head_dim, dtype, causal):
    """Compiles what `forward` would launch; counts instructions of its machine code."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import gluon_forward
    from afbs_compile.kernels.geometry import Mask

    class AbsentDriver:
        """What Triton asks of a driver to compile a kernel, for a device that is not here."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    class Compiled:
        """Stands in for the kernel: a launch compiles it."""

        def __getitem__(self, grid):
            return lambda *args, **options: made.append(kernel.warmup(*args, grid=grid, **options))

    made, kernel = [], gluon_forward.forward_kernel
    driver.set_active(AbsentDriver())
    gluon_forward.forward_kernel = Compiled()
    gluon_forward.processors = lambda device: 132
    q = torch.zeros(1, 512, 4, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
    counts, indices = (torch.zeros(1, 4, 4, *n, dtype=torch.int32) for n in ((), (8,)))
    policy = torch.zeros(4, 8)
    site = {"mask": Mask(causal), "scale": 1.0}
    gluon_forward.forward(q, q[:, :2], q[:, :2], counts, indices, policy, **site)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "forward.cubin"
    cubin.write_bytes(made[0].asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return count(tool, cubin, (head_dim + 128) // 16) | {"shared": made[0].metadata.shared}


def count(tool, cubin, per_step):
    """Registers of a thread, and how often each instruction of interest occurs."""
    usage, code = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    names = ("HGMMA", "LDL", "STL", "UTMALDG")
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in names}
    bodies = loops_over_steps(code, per_step)
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "loops": len(bodies),
        "spills_in_loops": sum(len(re.findall(r"\b(?:LDL|STL)\b", body)) for body in bodies),
        "fewest_permutations": min(body.count("PRMT") for body in bodies),
    }


def loops_over_steps(code, per_step):
    """The text of every loop whose body is one step: `per_step` tensor-core instructions."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", code)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    bodies = []
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA (0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            body = "\n".join(text for _, text in lines[at[int(target[1], 16)] : i + 1])
            if body.count("HGMMA") == per_step:
                bodies.append(body)
    return sorted(bodies, key=len)[:LOOPS]  # longer ones jump back over the end of a tile


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for_hopper(*json.loads(sys.argv[1]))))
