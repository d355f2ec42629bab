"""Does the portable forward compile without spilling in its loops, and with tensor cores?

Needs no GPU: Triton brings ptxas and cuobjdump. This file also runs as a program, in a process of
its own: Triton is either interpreted or not, for a whole process.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166_912, 90: 232_448}  # what one program may use
VARIANTS = [  # of two tiles a step, P·V a step behind
    dict(zip(("pair", "ahead"), flags, strict=True))
    for flags in itertools.product((False, True), repeat=2)
]
CASES = [
    (arch, head_dim, causal, None)
    for arch in SHARED_BYTES
    for head_dim in (64, 128, 256)
    for causal in (False, True)
]
CASES += [
    (90, head_dim, causal, variant)
    for head_dim in (64, 128)
    for causal in (False, True)
    for variant in VARIANTS
]
QUICK = (90, 128, True, None)


def check(arch, head_dim, causal, variant, tmp_path):
    """Compiles a case in a fresh process and looks at its machine code."""
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, json.dumps([arch, head_dim, causal, variant])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["shared"] <= SHARED_BYTES[arch]
    # every query and some query sees each key, and the rest; without boxes the last two are one
    assert len(found["loops"]) == (3 if arch == 90 else 2)
    for loop in found["loops"]:
        assert loop["LDL"] == loop["STL"] == 0
        # weights and operands go from instruction to instruction without a detour
        assert loop["PRMT"] == loop["LDSM"] == 0 or arch == 80
    if arch == 90:
        assert found["boxes"] > 0
        # no more fences than products: ptxas has not put the asynchronous ones one after another
        fences = [loop["WARPGROUP"] / loop["products"] for loop in found["loops"]]
        assert max(fences) < 1


def test_no_spills_and_tensor_cores(tmp_path):
    check(*QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != QUICK])
def test_every_case(case, tmp_path):
    check(*case, tmp_path)


def compile_for(arch, head_dim, causal, variant):
    """Compiles what `forward` would launch; measures the loops of its machine code."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from afbs_compile.kernels import boxes, triton_forward
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
        """Stands in for the kernel: a launch compiles it."""

        def __getitem__(self, grid):
            return lambda *args, **options: made.append(kernel.warmup(*args, grid=grid, **options))

    made, kernel, usual = [], triton_forward.forward_kernel, triton_forward.tiling
    driver.set_active(AbsentDriver())
    triton_forward.forward_kernel = Compiled()
    triton_forward.shared_memory_bytes = lambda device: SHARED_BYTES[arch]
    boxes.has_copy_engine = lambda device: arch >= 90
    if variant is not None:
        triton_forward.tiling = lambda *args, **options: usual(*args, **options)._replace(
            **variant
        )
    q = torch.zeros(1, 512, 4, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    counts, indices = (torch.zeros(1, 4, 4, *n, dtype=torch.int32) for n in ((), (8,)))
    site = {"mask": Mask(causal), "scale": 1.0, "block_m": 128, "block_n": 64}
    triton_forward.forward(q, q[:, :2], q[:, :2], counts, indices, torch.zeros(4, 8), **site)
    return measured(made[0])


def measured(kernel):
    """Shared memory, and how often each instruction of interest occurs in the loops over steps."""
    import triton

    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-sass", cubin]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("LDL", "STL", "PRMT", "LDSM", "WARPGROUP")
    loops = [
        {name: len(re.findall(rf"\b{name}\b", body)) for name in names}
        | {"products": len(re.findall(r"\bH(?:G)?MMA\b", body))}
        for body in loop_bodies(code)
    ]
    boxes = len(re.findall(r"\bUTMALDG\b", code))
    return {"shared": kernel.metadata.shared, "loops": loops, "boxes": boxes}


def loop_bodies(code):
    """The text of the innermost loops that use tensor cores.

    A loop ends with a jump back on a condition; a plain jump back ends a wait that was moved.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    found = ((at, re.match(r"@.*\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in lines)
    jumps = [(int(match[1], 16), at) for at, match in found if match and int(match[1], 16) < at]
    bodies = {
        (start, end): "\n".join(text for at, text in lines if start <= at <= end)
        for start, end in jumps
    }
    bodies = {span: text for span, text in bodies.items() if "MMA" in text}
    return [
        text for (start, end), text in bodies.items()
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in bodies)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_for(*json.loads(sys.argv[1]))))
