"""How is a prompt answered, and when does the first token come? Greedy `generate()`, timed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afbs_compile.bench.forced import Forced, Heads
from afbs_compile.bench.variants import Thresholds
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head
from afbs_compile.timing import synchronise

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model.

    Attributes:
        name: In rows and tables.
        thresholds: What its heads do; None for a dense way without us.
        tuning_seconds: Of the tuning that found them; None if nothing was tuned.
        gaining: Sites that this tuning would make sparse by its clock; None likewise.
    """

    name: str
    thresholds: Thresholds | None = None
    tuning_seconds: float | None = None
    gaining: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written.

    Attributes:
        tokens: Int64 `[new]`, on the host.
        logits: Float32 `[new, V]`, on the model's device.
        first_s: Seconds from the call of `generate` to its first token on the host.
        total_s: Seconds to its last one.
    """

    tokens: Tensor
    logits: Tensor
    first_s: float
    total_s: float


@dataclass(slots=True)
class Clock:
    """A streamer that only notes when tokens come; the prompt is the first thing that comes."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Note a moment; tokens are on the host already."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


def heads_of(thresholds: Thresholds) -> Heads:
    """Thresholds as the backend asks for them."""

    def heads(site: Site) -> tuple[Head, ...]:
        return thresholds.sites.get(site.name, (thresholds.everywhere,) * site.heads)

    return heads


class Writer:
    """A Hugging Face model that answers prompts in many ways; ours share one compiled graph."""

    def __init__(
        self, module: Any, force: Forced, options: dict[str, Any], compiled_decode: bool
    ) -> None:
        """Take a model; nothing is compiled before the first prompt.

        Args:
            module: A causal language model of transformers.
            force: Puts thresholds into our graph.
            options: Of the backend `afbs`.
            compiled_decode: Whether single tokens run compiled as well.
        """
        self.module, self.force, self.compiled_decode = module, force, compiled_decode
        self.plain: Call = torch.compile(module._call_impl)
        self.ours: Call = torch.compile(module._call_impl, backend="afbs", options=options)

    def ready(self, way: Way) -> None:
        """Let our graph run by a way's thresholds."""
        if way.thresholds is not None:
            self.force.move(heads_of(way.thresholds))

    def forward(self, way: Way) -> Call:
        """What reads prompts."""
        if way.thresholds is not None:
            return self.ours
        eager: Call = self.module._call_impl
        return eager if way.name == "eager" else self.plain

    @contextmanager
    def running(self, way: Way) -> Iterator[None]:
        """Let calls of the model be a way's: of a prompt, and if asked for of single tokens."""
        forward = self.forward(way)

        def call(*args: Any, **given: Any) -> Any:
            prompt = given["input_ids"].shape[1] > 1
            chosen = forward if prompt or self.compiled_decode else self.module._call_impl
            return chosen(*args, **given)

        self.module._compiled_call_impl = call  # what `module.compile()` sets
        try:
            yield
        finally:
            self.module._compiled_call_impl = None

    @torch.no_grad()
    def answer(self, way: Way, prompt: Tensor, new: int) -> Answer:
        """The `new` likeliest tokens, one after the other, after a prompt int64 `[n]`.

        The end-of-text token is never taken, so that all answers have one length.
        """
        ids = prompt[None].to(self.module.device)
        clock = Clock()
        with self.running(way):
            synchronise(self.module.device)
            begun = time.perf_counter()
            found = self.module.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return Answer(
            found.sequences[0, ids.shape[1] :].cpu(),
            torch.cat(found.logits),
            clock.times[1] - begun,
            clock.times[-1] - begun,
        )


def agreed(found: Tensor, wanted: Tensor) -> int:
    """How many tokens of two answers `[new]` agree before the first that does not."""
    return int((found == wanted).int().cumprod(0).sum())


def gap(found: Answer, wanted: Answer) -> float | None:
    """How much likelier `wanted` holds its own token where the answers part, in logits.

    None if they do not part. A bfloat16 near 20 has neighbours .125 away: there a gap of so much
    is a tie.
    """
    at = agreed(found.tokens, wanted.tokens)
    if at == len(wanted.tokens):
        return None
    logits = wanted.logits[at]
    return float(logits[wanted.tokens[at]] - logits[found.tokens[at]])
