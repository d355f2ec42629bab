"""What do tangents of dropped blocks buy, and what do they cost? A real model on real text.

`python bench/compensation.py --text FILE [--text FILE …]`. Every layer attends with
one tau for all heads. KL(dense ‖ sparse) is a mean over tokens; `seconds` are those of all
attention calls of one forward, selection included, and `cpu_seconds` the processor's own time in
them, which other programs on the machine do not lengthen.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afbs_compile.bench.harness import RESULTS
from afbs_compile.bench.ledger import Ledger
from afbs_compile.capture import Layer
from afbs_compile.commands.quality_options import DTYPES
from afbs_compile.demo.measure import CHUNK, perplexity, synchronise
from afbs_compile.demo.model import LanguageModel, from_folder, smollm2
from afbs_compile.demo.text import read, windows
from afbs_compile.evaluators import DirectEvaluator
from afbs_compile.kernels import dispatch
from afbs_compile.kernels.compensation import COMPENSATIONS
from afbs_compile.kernels.geometry import Mask
from afbs_compile.options import default_cache_dir
from afbs_compile.policy import Head
from afbs_compile.policy_tensor import rows as policy_rows
from afbs_compile.timing import One

IMPLEMENTATION = "afbs_bench"
KEY = ("model", "dtype", "text", "window", "tokens", "setting")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """How all layers attend."""

    selector: str = "sub8"
    tau: float = 1.0
    compensation: str = "none"
    dense: bool = False

    def __str__(self) -> str:
        """As a row names it."""
        return "dense" if self.dense else f"{self.selector} {self.tau:g} {self.compensation}"


@dataclass(slots=True)
class Attention:
    """What the model calls instead of its attention; notes time and density of every call."""

    setting: Setting = Setting(dense=True)
    counting: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    densities: list[float] = field(default_factory=list)

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """One causal attention call in the form of transformers' attention functions."""
        scale = given.get("scaling") or q.shape[-1] ** -0.5
        layer = Layer(q, k, v, Mask(True), scale)
        synchronise(q.device)
        start, cpu = time.perf_counter(), time.process_time()
        out = self.attend(layer)
        synchronise(q.device)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        if self.counting and not self.setting.dense:
            self.densities.append(density(layer, self.setting))
        return out.transpose(1, 2).contiguous(), None

    def attend(self, layer: Layer) -> Tensor:
        """The call under the setting."""
        if self.setting.dense:
            return dispatch.dense(layer.q, layer.k, layer.v, mask=layer.mask, scale=layer.scale)
        return dispatch.attention(
            layer.q, layer.k, layer.v, uniform(layer, self.setting.tau), mask=layer.mask,
            scale=layer.scale, selector=self.setting.selector,
            compensation=self.setting.compensation,
        )  # fmt: skip

    def reset(self, setting: Setting, counting: bool = False) -> None:
        """Begin with another setting."""
        self.setting, self.counting = setting, counting
        self.seconds, self.cpu_seconds, self.densities = 0.0, 0.0, []


@dataclass(frozen=True, slots=True)
class Answer:
    """A forward that has been run."""

    given: Any

    def __call__(self, **inputs: Any) -> Any:
        """Its result."""
        return self.given


def uniform(layer: Layer, tau: float) -> Tensor:
    """Policy tensor with one tau for all heads of a layer."""
    return policy_rows([Head("sparse", tau)] * layer.q.shape[1], layer.q.device)


def density(layer: Layer, setting: Setting) -> float:
    """Visited of the visible blocks, mean over the heads."""
    direct = DirectEvaluator(One(layer), "bench", layer.q.shape[1], setting.selector)
    kept, seen = direct.count(layer, uniform(layer, setting.tau))
    return float(kept.sum() / seen.sum())


def install(module: Any) -> Attention:
    """Make a transformers model attend through an `Attention`; inputs must be one whole text."""
    from transformers import AttentionInterface

    attention = Attention()
    AttentionInterface.register(IMPLEMENTATION, attention)
    module.set_attn_implementation(IMPLEMENTATION)
    return attention


@torch.no_grad()
def divergence(dense: Tensor, sparse: Tensor) -> float:
    """KL(dense ‖ sparse) in nats, mean over the positions of logits `[n, vocabulary]`."""
    total = 0.0
    for p, q in zip(torch.split(dense, CHUNK), torch.split(sparse, CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total / dense.shape[0]


@torch.no_grad()
def measured(
    model: LanguageModel,
    attention: Attention,
    window: Tensor,
    settings: list[Setting],
    rounds: int,
) -> Iterator[Row]:
    """Quality of every setting on one window, then time, all settings in turn."""
    inputs = model.inputs(window)
    attention.reset(Setting(dense=True))
    dense = model.module(**inputs)
    perplexity_dense = perplexity(Answer(dense), inputs)
    found: dict[Setting, Row] = {}
    for setting in settings:
        attention.reset(setting, counting=True)
        sparse = model.module(**inputs)
        found[setting] = {
            "tokens": len(window), "setting": str(setting), "selector": setting.selector,
            "tau": setting.tau, "compensation": setting.compensation,
            "density": statistics.mean(attention.densities),
            "perplexity_dense": perplexity_dense,
            "perplexity_sparse": perplexity(Answer(sparse), inputs),
            "kl": divergence(dense.logits[0], sparse.logits[0]),
        }  # fmt: skip
    times: dict[Setting, list[tuple[float, float]]] = {}
    for _ in range(rounds):  # what compiles has done so by now
        for setting in (Setting(dense=True), *settings):
            attention.reset(setting)
            model.module(**inputs, logits_to_keep=1)
            times.setdefault(setting, []).append((attention.seconds, attention.cpu_seconds))
    for setting, row in found.items():
        yield row | timed(times[setting], "") | timed(times[Setting(dense=True)], "_dense")


def timed(runs: list[tuple[float, float]], suffix: str) -> Row:
    """Medians of wall-clock and processor time."""
    wall, cpu = (statistics.median(kind) for kind in zip(*runs, strict=True))
    return {f"seconds{suffix}": wall, f"cpu_seconds{suffix}": cpu}


def parsed() -> argparse.Namespace:
    """What to run."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="smollm2", help="a Hugging Face folder (default: smollm2)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1, help="of every text")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.97, 0.99])
    parser.add_argument("--selectors", nargs="+", default=["sub8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="begin no window after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results go")
    return parser.parse_args()


def line(row: Row) -> str:
    """A row for people who wait."""
    change = math.log(row["perplexity_sparse"] / row["perplexity_dense"])
    return (
        f"{row['text']} {row['window']} {row['setting']}: density {row['density']:.3f}, "
        f"KL {row['kl']:.4f}, perplexity {change:+.2%}, {row['seconds']:.4f} s "
        f"({row['cpu_seconds']:.2f} cpu; dense {row['seconds_dense']:.4f}, "
        f"{row['cpu_seconds_dense']:.2f})"
    )


def main() -> None:
    """Measure what is not known yet, and store it window by window."""
    asked = parsed()
    dtype: torch.dtype = getattr(torch, asked.dtype)
    ledger = Ledger(
        "compensation" if torch.cuda.is_available() else "compensation_cpu", KEY, asked.output,
        asked.seconds,
    )  # fmt: skip
    if asked.model == "smollm2":
        model = smollm2(default_cache_dir(), dtype)
    else:
        model = from_folder(Path(asked.model), dtype)
    attention = install(model.module)
    settings = [
        Setting(selector, tau, compensation)
        for selector in asked.selectors
        for tau in asked.taus
        for compensation in COMPENSATIONS
    ]
    texts = {
        path.stem: windows(model.tokens(read(path)), asked.tokens, asked.windows)
        for path in asked.text
    }
    for number in range(asked.windows):
        for text, cut in texts.items():
            about = {"model": model.name, "dtype": asked.dtype, "text": text, "window": number}
            rows = {s: about | {"tokens": asked.tokens, "setting": str(s)} for s in settings}
            left = [s for s, row in rows.items() if not ledger.has(row)]
            if left and ledger.over():
                ledger.notes.append(f"left out for want of time: {text}, window {number}")
            elif left:
                for row in measured(model, attention, cut[number], left, asked.rounds):
                    ledger.add(about | row)
                    print(line(about | row), flush=True)
    ledger.write()


if __name__ == "__main__":
    main()
