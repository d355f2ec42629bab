"""Do the Gluon backward's kernels compile for Hopper without spilling in their loops?

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
CASES = [
    (head_dim, dtype, causal)
    for head_dim in (64, 128)
    for dtype in ("bfloat16", "float16")
    for causal in (False, True)
]
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
    dq, dkdv = found["dq_kernel"], found["dkdv_kernel"]
    # three products of 128 keys, four of 64 queries; 16 deep an instruction
    check_kernel(dq, 2 * case[0] // 16 + 128 // 16, products=3, consumers=2)
    check_kernel(dkdv, 2 * case[0] // 16 + 2 * 64 // 16, products=4, consumers=1)
    # one program a processor, and two
    assert dq["shared"] <= SHARED_BYTES
    assert dq["registers"] * 12 * 32 <= 65_536
    assert 2 * (dkdv["shared"] + 1024) <= SHARED_BYTES + 1024
    assert 2 * dkdv["registers"] * 8 * 32 <= 65_536


def check_kernel(found, per_step, products, consumers):
    """Each consumer has two loops: steps with a mask and steps without one."""
    assert found["HGMMA"] == 2 * consumers * per_step
    assert len(found["loops"]) == 2 * consumers
    assert found["UTMALDG"] > 0
    assert found["UTMASTG"] > 0
    loops = sorted(found["loops"], key=lambda loop: loop["length"])
    # where a wait is missing or too weak, ptxas waits after every instruction of the whole kernel
    assert all(loop["groups"] == products for loop in loops)
    # some scalars, such as the number of the step, may wait in memory; tensors must not
    assert all(loop["LDL"] + loop["STL"] <= 8 for loop in loops[:consumers])
    # half-precision operands are made in pairs, by one instruction
    assert all(loop["PRMT"] == 0 for loop in loops[:consumers])
    assert found["LDL"] <= 80


def test_no_spills_and_tensor_cores(tmp_path):
    check(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != QUICK])
def test_every_case(case, tmp_path):
    check(case, tmp_path)


def compile_for_hopper(head_dim, dtype, causal):
    """Compiles what `backward` would launch; looks at the machine code of both kernels."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import gluon_backward
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
        """Stands in for a kernel: a launch compiles it and measures the result."""

        def __init__(self, name, per_step):
            self.kernel, self.name = getattr(gluon_backward, name), name
            self.per_step = per_step
            setattr(gluon_backward, name, self)

        def __getitem__(self, grid):
            return lambda *args, **options: found.update(
                {
                    self.name: measured(
                        self.kernel.warmup(*args, grid=grid, **options), self.per_step
                    )
                }
            )

    found = {}
    driver.set_active(AbsentDriver())
    Compiled("dq_kernel", 2 * head_dim // 16 + 128 // 16)
    Compiled("dkdv_kernel", 2 * head_dim // 16 + 2 * 64 // 16)
    gluon_backward.processors = lambda device: 132
    q = torch.zeros(1, 512, 4, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
    k, statistics = q[:, :2], torch.zeros(1, 4, 512)
    lists = tuple(torch.zeros(1, 4, 4, *n, dtype=torch.int32) for n in ((), (8,)))
    gluon_backward.transposed = lambda *lists: lists
    call = gluon_backward.Call(
        q, k, k, q, torch.zeros(4, 8), statistics, statistics, Mask(causal), 1.0
    )
    gluon_backward.query_gradient(call, *lists)
    gluon_backward.key_gradients(call, *lists)
    return found


def measured(kernel, per_step):
    """Shared memory, registers, instructions of interest, and the loops over steps."""
    import triton

    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, code = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    names = ("HGMMA", "LDL", "UTMALDG", "UTMASTG")
    return {name: len(re.findall(rf"\b{name}\b", code)) for name in names} | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "loops": loops_over_steps(code, per_step),
    }


def loops_over_steps(code, per_step):
    """Length and instructions of every innermost loop of `per_step` tensor-core instructions."""
    lines = [
        (int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", code)
    ]
    found = ((at, re.match(r"@.*\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in lines)
    jumps = [(int(match[1], 16), at) for at, match in found if match and int(match[1], 16) < at]
    bodies = {}
    for start, end in jumps:
        body = [text for at, text in lines if start <= at <= end]
        if sum("HGMMA" in text for text in body) == per_step:
            inner = bodies.get(start, body)
            bodies[start] = min(inner, body, key=len)
    return [
        {"length": len(body), "groups": sum("HGMMA" in t and "gsb0" in t for t in body)}
        | {name: sum(name in text for text in body) for name in ("LDL", "STL", "PRMT")}
        for body in bodies.values()
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for_hopper(*json.loads(sys.argv[1]))))
