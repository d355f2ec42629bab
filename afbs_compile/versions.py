"""On what was this measured? Versions and the device's name, for policies and results."""

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("afbs-compile", "torch", "triton", "numpy", "scipy", "transformers")


def version(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None if absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's version and that of every package of `PACKAGES` which is installed."""
    found = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}


def device_name(device: "torch.device") -> str:
    """What a person calls the device: the GPU's marketing name, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else str(device)


def processor_name() -> str:
    """The processor's model name where Linux tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
