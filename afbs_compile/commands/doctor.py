"""`afbs doctor`: what this machine can do, and the next step where something is missing."""

import importlib.util
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from afbs_compile import cache, options
from afbs_compile.commands.output import console, emit_json
from afbs_compile.versions import device_name, version

INTEGRATED = ("transformers", "diffusers")
DEMO_PACKAGES = ("transformers", "gguf", "accelerate", "matplotlib")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `next_step` where it is not well."""

    name: str
    well: bool
    needed: bool
    found: str
    next_step: str = ""


def run(args: Namespace) -> int:
    """Look at everything; exit code 1 if something that is needed is missing."""
    findings = list(examine(args.cache_dir))
    healthy = all(finding.well or not finding.needed for finding in findings)
    sites = attention_of(args) if args.model else None
    if args.json:
        found = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        emit_json(found | ({"attention": sites.to_dict()} if sites else {}))
        return 0 if healthy else 1
    table = Table()
    for column in ("", "what", "found", "next step"):
        table.add_column(column)
    for finding in findings:
        mark = "ok" if finding.well else "MISSING" if finding.needed else "–"
        table.add_row(mark, finding.name, finding.found, finding.next_step)
    console().print(table)
    if sites:
        console().print(sites)
    return 0 if healthy else 1


def attention_of(args: Namespace) -> Any:
    """What would become of every attention call of a model."""
    import torch

    from afbs_compile.demo import model
    from afbs_compile.survey import survey

    given = {} if args.min_length is None else {"min_length": args.min_length}
    language_model = model.from_folder(args.model)
    window = torch.zeros(args.tokens, dtype=torch.long)  # which tokens does not matter
    return survey(language_model.module, language_model.inputs(window), options.parse(given))


def examine(cache_dir: Path | None) -> Iterator[Finding]:
    """All findings."""
    yield from packages()
    yield entry_point()
    yield writable(cache.folder(cache_dir))
    yield switched_on()
    if version("torch"):
        yield from device()


def packages() -> Iterator[Finding]:
    """Versions of what is needed, and of what the demo needs."""
    for package in ("torch", "numpy", "scipy"):
        found = version(package)
        step = "" if found else f"run `pip install {package}`"
        yield Finding(package, found is not None, True, found or "not installed", step)
    missing = [package for package in DEMO_PACKAGES if not version(package)]
    step = 'run `pip install "afbs-compile[demo]"`' if missing else ""
    found = f"not installed: {', '.join(missing)}" if missing else "all there"
    yield Finding("demo packages", not missing, False, found, step)
    there = [f"{package} {version(package)}" for package in INTEGRATED if version(package)]
    found = ", ".join(there) or "none of " + ", ".join(INTEGRATED)
    yield Finding("integrations", True, False, found)


def entry_point() -> Finding:
    """Whether `torch.compile(backend="afbs")` can find us."""
    points = metadata.entry_points(group="torch_dynamo_backends", name="afbs")
    found = ", ".join(point.value for point in points) or "not registered"
    step = "" if points else "install the package: `pip install afbs-compile`"
    return Finding("backend registered", bool(points), True, found, step)


def writable(folder: Path) -> Finding:
    """Whether policies can be kept: a file is really written, and taken away again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        step = "make it writable, or set AFBS_CACHE_DIR"
        return Finding("cache folder", False, True, str(error), step)
    return Finding("cache folder", True, True, str(folder))


def switched_on() -> Finding:
    """Whether the environment switches us off."""
    if options.disabled():
        return Finding("switched on", False, False, "AFBS_DISABLE is set", "unset AFBS_DISABLE")
    return Finding("switched on", True, False, "yes")


def device() -> Iterator[Finding]:
    """The device that models run on, and what our kernels need there."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    yield Finding("device", True, True, f"{kind}: {device_name(torch.device(kind))}")
    yield compiler()
    has_triton = importlib.util.find_spec("triton") is not None
    found = version("triton") or "not installed"
    step = "" if has_triton else "run `pip install triton`"
    yield Finding("triton", has_triton, kind == "cuda", found, step)
    yield Finding("kernels", has_triton or kind == "cpu", True, kernel_path(kind))


def kernel_path(kind: str) -> str:
    """Which kernels a call takes here, and why not the faster ones."""
    if kind == "cpu":
        return "compiled FlexAttention"
    from afbs_compile.kernels.gluon_shim import available

    reason = available()
    return (
        f"Triton ({reason})" if reason else "Gluon for half precision, head dim 64 or 128; Triton"
    )


def compiler() -> Finding:
    """The C++ compiler, which Inductor needs on every device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        step = "install g++ (`apt-get install g++`), or set CXX"
        return Finding("C++ compiler", False, True, str(error).splitlines()[0], step)
    return Finding("C++ compiler", True, True, os.fspath(found))
