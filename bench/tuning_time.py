"""How long does tuning take? Seconds by phase, and what a profile costs in dense passes.

`python bench/tuning_time.py`, or `afbs bench tuning-time`. `docs/benchmarks.md` says what a row
means. A model is tuned by `afbs_compile.tune` as anybody's would be, in an empty cache; its first
tuning also compiles kernels.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import afbs_compile
from afbs_compile import calibrate, measurements
from afbs_compile.bench import script
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.tuner_sites import LAMBDAS
from afbs_compile.capture import Layer
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model as models
from afbs_compile.demo import text
from afbs_compile.evaluators import profiled
from afbs_compile.kernels import dispatch
from afbs_compile.kernels.geometry import Mask
from afbs_compile.options import default_cache_dir
from afbs_compile.policy import Tuning, bucket_of
from afbs_compile.profiling import Walk
from afbs_compile.progress import Progress
from afbs_compile.timing import synchronise
from afbs_compile.tuner.afbs_bo import AfbsBo

KEY = ("case", "model", "tokens", "documents", "run", "levels")
SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 64,
    },
}  # fmt: skip
PHRASE = 12  # tokens of a topic: neighbours are alike, so that there is something to select
LOUD = 3.0  # topic over noise
LEVELS = (1, len(LAMBDAS))
DENSE_CALLS, PROFILES = 20, 3
RUNS = ("first", "second")  # the first compiles kernels


class Watch:
    """Seconds, wall clock and processor's, of the parts of a tuning."""

    def __init__(self, device: torch.device) -> None:
        """Nothing yet."""
        self.device = device
        self.seconds: dict[str, float] = {}

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part."""

        def timed(*args: Any, **given: Any) -> Any:
            with self.of(part):
                return function(*args, **given)

        return timed

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        synchronise(self.device)
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            synchronise(self.device)
            for name, took in (("seconds", time.perf_counter() - start),
                               ("cpu_seconds", time.process_time() - cpu)):  # fmt: skip
                key = f"{name}_{part}" if part else name
                self.seconds[key] = self.seconds.get(key, 0.0) + took

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all parts of what is tuned inside; what is left is capture and hashing."""
        parts = (
            (Walk, "run", "profile"),
            (measurements, "speeds", "timing"),
            (calibrate, "tune", "search"),
            (AfbsBo, "validate", "validation"),
        )
        with ExitStack() as stack:
            for where, name, part in parts:
                wrapped = self.wrap(part, getattr(where, name))
                stack.enter_context(patch.object(where, name, wrapped))
            yield


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for and is not known yet; kept in `output` row by row.

    Raises:
        CommandError: An argument is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model not in (*SHAPES, "smollm2"):
        raise CommandError(f"no model {args.model!r}; there are {', '.join(SHAPES)}, smollm2")
    name = "tuning_time" if device.type == "cuda" else "tuning_time_cpu"
    ledger = Ledger(name, KEY, output, args.seconds)
    lengths = [int(n) for n in args.tokens.split(",")]
    with Progress() as progress:
        for row in rows(args, lengths, device, ledger):
            ledger.add(row)
            progress.bars.console.print(line(row), markup=False, highlight=False, soft_wrap=True)
    ledger.write()
    return ledger.document()


def rows(
    args: argparse.Namespace, lengths: Sequence[int], device: torch.device, ledger: Ledger
) -> Iterator[Row]:
    """Profiles of one layer first, then whole models."""
    wanted = args.case.split(",")
    if "profile" in wanted and args.model != "smollm2":
        for length in lengths:
            yield from profiles(args.model, length, device, ledger)
    if "model" in wanted:
        yield from tunings(args, lengths, device, ledger)


def missing(ledger: Ledger, row: Row) -> bool:
    """Whether there is no such row yet, and time for it; one that is left out is noted."""
    if ledger.has(row):
        return False
    if ledger.over():
        ledger.notes.append(f"left out for want of time: {', '.join(map(str, row.values()))}")
        return False
    return True


def profiles(model: str, length: int, device: torch.device, ledger: Ledger) -> Iterator[Row]:
    """What the profile of a layer costs, in dense passes of SDPA over the same tensors."""
    found = [
        row
        for levels in LEVELS
        if missing(ledger, row := about("profile", model, length, 1, "second", levels))
    ]
    if not found:
        return
    layer = clustered(SHAPES[model], length, device)
    dense = seconds(lambda: dense_of(layer), device, DENSE_CALLS)
    for row in found:
        took = seconds(lambda: profile_of(layer, row["levels"]), device, PROFILES)  # noqa: B023
        yield row | {
            "seconds": took, "seconds_dense": dense, "dense_passes": took / dense,
            "heads": layer.q.shape[1], "head_dim": layer.q.shape[3], "dtype": str(layer.q.dtype),
        }  # fmt: skip


def about(case: str, model: str, length: int, documents: int, run: str, levels: int) -> Row:
    """The fields that say what a row measures."""
    return dict(zip(KEY, (case, model, length, documents, run, levels), strict=True))


def clustered(shapes: dict[str, int], length: int, device: torch.device) -> Layer:
    """q, k and v of one layer: a topic for every few tokens, and noise."""
    heads = shapes["num_attention_heads"]
    dim = shapes["hidden_size"] // heads
    noise = torch.Generator(device=device).manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, dim, generator=noise, device=device)

    topics = drawn(-(-length // PHRASE)).repeat_interleave(PHRASE, 2)[:, :, :length]
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k = (((LOUD / dim**0.25) * topics + drawn(length)).to(kind) for _ in range(2))
    return Layer(q, k, drawn(length).to(kind), Mask(True), dim**-0.5)


@torch.no_grad()
def dense_of(layer: Layer) -> Tensor:
    """SDPA as the dense model calls it."""
    return dispatch.dense(layer.q, layer.k, layer.v, mask=layer.mask, scale=layer.scale)


@torch.no_grad()
def profile_of(layer: Layer, levels: int) -> Any:
    """The profile of a layer as tuning makes it, tables on the host."""
    heads = layer.q.shape[1]
    return profiled(layer, selector="sub8", heads=heads, lambdas=LAMBDAS[:levels])


def seconds(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Mean wall-clock seconds of a call, after one that warms up."""
    call()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def tunings(
    args: argparse.Namespace, lengths: Sequence[int], device: torch.device, ledger: Ledger
) -> Iterator[Row]:
    """Whole models tuned, twice at every length."""
    wanted = [
        row
        for length in lengths
        for run in RUNS
        if not ledger.has(row := about("model", args.model, length, args.documents, run, 1))
    ]
    if not wanted:
        return
    module, ids = subject(args, max(lengths), device)
    for row in wanted:
        if missing(ledger, row):
            length = row["tokens"]
            inputs = [{"input_ids": one[None, :length], "use_cache": False} for one in ids]
            yield row | tuned(module, inputs, length, device)


def subject(
    args: argparse.Namespace, length: int, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """The model, and documents int64 `[documents, length]`."""
    if args.model == "smollm2":
        made = models.smollm2(default_cache_dir())
        body = made.tokens(text.default())
        cut = text.windows(body, length, args.documents)
        return made.module, torch.stack(cut).to(device)
    from transformers import LlamaConfig, LlamaModel

    shapes = SHAPES[args.model]
    config = LlamaConfig(**shapes, max_position_embeddings=length)  # type: ignore[arg-type]
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            torch.manual_seed(0)
            network: Any = LlamaModel(config)
            module = network.eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(standard)
    kinds = torch.randint(shapes["vocab_size"], (args.documents, -(-length // PHRASE)))
    return module, kinds.repeat_interleave(PHRASE, 1)[:, :length].to(device)


def tuned(
    module: nn.Module, inputs: Sequence[dict[str, Any]], length: int, device: torch.device
) -> Row:
    """One tuning, in a cache of its own, timed."""
    torch._dynamo.reset()
    watch = Watch(device)
    with tempfile.TemporaryDirectory() as empty, watch.watching(), watch.of(""):
        policy = afbs_compile.tune(module, inputs, min_length=1, cache_dir=empty)
    made = policy.find_any(bucket_of(length))
    assert isinstance(made, Tuning)
    heads = [head for site in made.sites.values() for head in site.heads]
    return watch.seconds | {
        "sites": len(made.sites), "heads": len(heads), "threads": torch.get_num_threads(),
        "density": sum(1.0 if h.density is None else h.density for h in heads) / len(heads),
        "cost_dense_passes": made.cost_dense_passes, "evaluations": made.evaluations,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip


def line(row: Row) -> str:
    """A row for people who wait."""
    at = f"{row['case']} {row['model']} {row['tokens']} {row['run']}"
    if row["case"] == "profile":
        return f"{at}, {row['levels']} levels: {row['dense_passes']:.1f} dense passes"
    parts = ", ".join(
        f"{name.removeprefix('seconds_')} {row[name]:.1f}"
        for name in ("seconds_profile", "seconds_timing", "seconds_search")
    )
    return f"{at}: {row['seconds']:.1f} s ({parts}; processor {row['cpu_seconds']:.1f})"


if __name__ == "__main__":
    sys.exit(script.main("tuning-time"))
