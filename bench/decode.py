"""How many tokens a second, and how many bytes of cache, when heads keep what they read?

`python bench/decode.py`, or `afbs bench decode`: a `HybridCache` beside dense caches, each variant
compiled and its step one CUDA graph. `docs/benchmarks.md` says what a row means.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig

from afbs_compile.bench import decode_model, decode_prompt, harness, script
from afbs_compile.bench.checks import FORWARD_BAR, WrongResult, relative, require
from afbs_compile.bench.decode_show import compared
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.commands.decode_options import VARIANTS
from afbs_compile.commands.errors import CommandError
from afbs_compile.kernels import decode
from afbs_compile.progress import Progress

KEY = ("case", "model", "tokens", "batch", "ratio", "window", "sink", "variant")
NO_DEVICE = (
    "there is no CUDA device here, and decoding of a GPU is what is measured; run it on a machine "
    "with an NVIDIA GPU, or try --model tiny"
)
REPEATS = 9


@dataclass(frozen=True, slots=True)
class Step:
    """One variant of one problem."""

    case: str
    model: str
    batch: int
    tokens: int
    ratio: float
    window: int
    sink: int
    variant: str

    def key(self) -> Row:
        """As a row names it."""
        return {name: getattr(self, name) for name in KEY}

    def __str__(self) -> str:
        """For people."""
        return f"{self.case} {self.model} {self.batch} x {self.tokens} {self.variant} {self.ratio}"


def plan(args: argparse.Namespace) -> list[Step]:
    """All steps, ours first; a dense variant has the ratio 0.

    Raises:
        CommandError: An argument cannot be read.
    """
    try:
        cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
        problems = [(batch, tokens) for batch, tokens in cases if batch > 0 and tokens > 0]
    except ValueError as error:
        raise CommandError(f"{error}; cases are BATCHxTOKENS, ratios numbers") from error
    variants = args.variants.split(",")
    if unknown := sorted({*variants} - {*VARIANTS}):
        raise CommandError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if args.model not in decode_model.MODELS:
        known = ", ".join(decode_model.MODELS)
        raise CommandError(f"no model {args.model!r}; there are {known}")
    if len(problems) < len(cases) or not all(0 <= ratio <= 1 for ratio in ratios):
        raise CommandError("batch and tokens are at least 1, ratios from 0 to 1")
    if args.case == "prompt":
        variants = ["hybrid"]  # beside cuDNN, run by run
    return [
        Step(args.case, args.model, batch, tokens, ratio, args.window, args.sink, variant)
        for batch, tokens in problems
        for variant in variants
        for ratio in (ratios if variant == "hybrid" else [0.0])
    ]


def made(step: Step, config: Any, like: torch.Tensor) -> Any:
    """The cache of a variant."""
    if step.variant in ("static", "whole"):
        return decode_model.static_cache(config, step.batch, step.tokens, like)
    return decode_model.hybrid_cache(
        config, step.batch, step.tokens, step.ratio, step.window, step.sink, like
    )


def timed(step: Step, model: Any) -> Row:
    """Tokens a second and bytes of one variant.

    Raises:
        WrongResult: The attention of the first layer is not what it should be.
    """
    cache = made(step, model.config, next(model.parameters()))
    if step.variant in ("hybrid", "ratio0"):
        verify(cache.layers[0], model.config)
    call = decode_model.stepper(model, cache, decode_model.ATTENTION[step.variant], step.batch)
    runs = harness.interleaved({step.variant: call}, repeats=REPEATS)[step.variant]
    low, middle, high = statistics.quantiles(runs, n=4)
    return {
        "step_ms": middle,
        "spread": (high - low) / middle,
        "tokens_per_s": 1e3 * step.batch / middle,
        "kv_bytes": decode_model.kv_bytes(cache),
    }


def verify(layer: Any, config: Any) -> None:
    """Compare the op with fp32 for the first sequence of a layer."""
    heads, dim = config.num_attention_heads, layer.keys.shape[2]
    q = torch.randn(1, heads, 1, dim, dtype=layer.dtype, device=layer.device)
    keys, values = layer.keys[:1], layer.values[:1]
    places = layer.bases, layer.slots, layer.lengths[:1]
    found = torch.ops.afbs.decode(q, keys, values, *places, layer.work, dim**-0.5, layer.splits)
    wanted = decode.on_cpu(q.float(), keys.float(), values.float(), *places, dim**-0.5)
    require("afbs::decode", relative(found, wanted), FORWARD_BAR)


def one_layer(step: Step) -> Row:
    """Time of the attention of one layer: of a prompt, or of a token with its bytes per second."""
    device, dtype = where(step.model)
    config = LlamaConfig(**decode_model.MODELS[step.model] | {"num_hidden_layers": 1})
    like = torch.zeros(1, dtype=dtype, device=device)
    if step.case == "prompt":
        return decode_prompt.prompt(
            config, step.tokens, step.ratio, step.window, step.sink, like, REPEATS
        )
    cache = made(step, config, like)
    layer = cache.layers[0]
    dim = layer.keys.shape[-1]
    q = torch.randn(step.batch, config.num_attention_heads, 1, dim, dtype=dtype, device=device)
    runs = harness.interleaved({"op": attention_of(step, layer, q)}, repeats=REPEATS)["op"]
    middle = statistics.median(runs)
    size = decode_model.kv_bytes(cache)
    return {"op_ms": middle, "gb_per_s": size / middle / 1e6, "kv_bytes": size}


def attention_of(step: Step, layer: Any, q: torch.Tensor) -> Callable[[], Any]:
    """The call that a variant's layer makes."""
    scale = q.shape[-1] ** -0.5
    if step.variant in ("hybrid", "ratio0"):
        from afbs_compile.hybrid_attention import one

        return lambda: one(layer, q, scale)
    if step.variant == "whole":
        return lambda: decode_model.whole(None, q, layer.keys, layer.values, None, scale)
    group = q.shape[1] // layer.keys.shape[1]
    seen = (torch.arange(layer.keys.shape[2], device=q.device) < step.tokens)[None, None, None]

    def repeated() -> torch.Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (layer.keys, layer.values))
        return sdpa(q, k, v, seen, scale=scale)

    return repeated


def where(model: str) -> tuple[torch.device, torch.dtype]:
    """Device and type of a model.

    Raises:
        CommandError: It needs a device that is not here.
    """
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    if model != "tiny":
        raise CommandError(NO_DEVICE)
    return torch.device("cpu"), torch.float32


def measured(steps: list[Step], ledger: Ledger, progress: Callable[..., Any]) -> None:
    """Measure what the ledger does not know."""
    left = [step for step in steps if not ledger.has(step.key())]
    model = None
    for done, step in enumerate(left):
        if ledger.over():
            ledger.notes.append(f"left out: {'; '.join(map(str, left[done:]))}")
            break
        progress(done, len(left), "decode", str(step))
        try:
            if step.case != "decode":
                row = one_layer(step)
            else:
                model = model or decode_model.network(step.model, *where(step.model))
                row = timed(step, model)
            ledger.add(step.key() | row)
        except torch.OutOfMemoryError:
            ledger.notes.append(f"{step}: the device's memory is too small")
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    progress(len(left), len(left), "decode", "")
    ledger.write()


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for; written to `output` after every variant.

    Raises:
        CommandError: There is no CUDA device, an argument cannot be read, or a result is wrong.
    """
    steps = plan(args)
    where(args.model)
    ledger = Ledger("decode_runs", KEY, output, args.seconds)
    try:
        with Progress() as progress:
            measured(steps, ledger, progress)
    except WrongResult as error:
        raise CommandError(f"{error}; please report it with this command") from error
    if args.case != "decode":
        rows = [row for row in ledger.rows if row["case"] == args.case]
        return ledger.document() | {"rows": rows}
    document = harness.document("decode", list(compared(ledger.rows)), ledger.notes)
    if output:
        harness.write(document, output)
    return document


if __name__ == "__main__":
    sys.exit(script.main("decode"))
