"""Does a model trained from scratch on sparse attention learn as one on dense attention does?

`python bench/pretrain.py`, or `afbs bench pretrain`: two runs of one small Llama over bytes, equal
but for the backend of `torch.compile`: "inductor", dense, and "afbs", where every head keeps
`--budget` of its blocks. Weights, windows and their order are the same. The runs take turns, step
by step, so a device that slows down slows both. Both are compiled block by block.
"""

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import afbs_compile
from afbs_compile.bench import harness, pretrain_model, pretrain_text, script
from afbs_compile.bench.pretrain_model import Llama
from afbs_compile.commands.errors import CommandError
from afbs_compile.progress import Progress
from afbs_compile.report import explain

FIRST = 3  # steps that compile and choose kernels: not timed
RISE = 20  # steps in which the learning rate rises
STATE_BYTES = 16  # of a parameter: itself, its gradient and two moments, float32
DENSE = [  # the fastest first
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip


@dataclass(slots=True)
class Run:
    """One model in training, and what came out so far.

    Attributes:
        name: "dense" or "sparse".
        model: Compiled.
        optimizer: Its own.
        losses: Nats a byte, of every step.
        ms: Device time of every step.
        held_out: Step and mean loss over the held-out windows.
        peak: Largest memory of a step, bytes, without the other run's state; None on a CPU.
    """

    name: str
    model: Llama
    optimizer: torch.optim.AdamW
    losses: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    peak: int | None = None

    def row(self, args: Namespace) -> dict[str, Any]:
        """What is stored."""
        timed = self.ms[FIRST:]
        median = statistics.median(timed) if timed else None
        return {
            "run": self.name,
            "model": args.model,
            "tokens": args.tokens,
            "batch": args.batch,
            "budget": args.budget if self.name == "sparse" else None,
            "seed": args.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": len(self.losses),
            "losses": self.losses,
            "ms": self.ms,
            "held_out": self.held_out,
            "step_ms": median,
            "tokens_per_s": 1e3 * args.batch * args.tokens / median if median else None,
            "peak_mib": None if self.peak is None else self.peak / 2**20,
        }


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Train both; kept in `output` whenever the held-out loss was measured.

    Raises:
        CommandError: An argument is wrong, the text is too short, or attention stayed dense.
    """
    begun = time.monotonic()
    checked(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = pretrain_text.stream(pretrain_text.read(args.text))
    trained, held_out = pretrain_text.windows(text, args.tokens + 1, args.held_out)
    batches = pretrain_text.order(len(trained), args.steps, args.batch, args.seed)
    rate = pretrain_model.warm_up(args.rate, RISE)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        runs = made(args, device, Path(folder))
        for step, chosen in enumerate(batches):
            progress(step, args.steps, "steps", f"loss {last(runs)}")
            if args.seconds is not None and time.monotonic() - begun > args.seconds:
                notes.append(f"{args.steps - step} steps left out after {args.seconds:g} s")
                break
            tokens = trained[chosen].to(device).long()
            for one in runs[:: 1 if step % 2 else -1]:
                train(one, tokens, rate(step), device)
            if step == 0:
                require_sparse(runs)
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                evaluate(runs, held_out, device)
                keep(args, runs, notes, output)
        if not runs[0].held_out or runs[0].held_out[-1][0] != len(runs[0].losses):
            evaluate(runs, held_out, device)
        notes.append(f"sparse weights read densely: held-out loss {densely(runs, held_out):.4f}")
    return keep(args, runs, notes, output)


def checked(args: Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        CommandError: An argument is out of range.
    """
    counts = (args.tokens, args.batch, args.steps, args.every, args.held_out)
    if min(counts) < 1 or not 0 < args.budget < 1 or args.rate <= 0:
        raise CommandError(
            "--tokens, --batch, --steps, --every and --held-out need 1 or more, --budget a number "
            "between 0 and 1, --rate one above 0"
        )


def made(args: Namespace, device: torch.device, folder: Path) -> list[Run]:
    """The dense and the sparse run at their beginning."""
    sizes = pretrain_model.config(args.model)
    dense, sparse = (pretrain_model.made(sizes, args.seed, device) for _ in range(2))
    for block in dense.layers:
        block.compile(backend="inductor")
    pretrain_model.compiled(sparse, args.budget, args.tokens, folder)
    named = {"dense": dense, "sparse": sparse}
    return [Run(n, m, pretrain_model.optimizer_of(m, args.rate)) for n, m in named.items()]


def loss_of(one: Run, tokens: Tensor, device: torch.device) -> Tensor:
    """The loss of a batch `[B, L + 1]`, in bfloat16 where autocast says so."""
    with sdpa_kernel(DENSE, set_priority=True), torch.autocast(device.type, torch.bfloat16):
        loss: Tensor = one.model(tokens)
    return loss


def train(one: Run, tokens: Tensor, rate: float, device: torch.device) -> None:
    """One step: forward, backward, optimizer; timed."""
    for group in one.optimizer.param_groups:
        group["lr"] = rate
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with timed(one.ms, device):
        loss = loss_of(one, tokens, device)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(one.model.parameters(), 1.0)
        one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)
    one.losses.append(loss.item())
    if device.type == "cuda" and len(one.losses) > FIRST:
        held = (STATE_BYTES - 4) * sum(p.numel() for p in one.model.parameters())
        one.peak = max(one.peak or 0, torch.cuda.max_memory_allocated() - before + held)


class timed:
    """Append the milliseconds of a `with` block: the device's, or a processor's wall clock."""

    def __init__(self, into: list[float], device: torch.device) -> None:
        """Time into a list."""
        self.into, self.clock = into, harness.cuda().event if device.type == "cuda" else None

    def __enter__(self) -> None:
        """Begin."""
        self.begun = time.perf_counter()
        if self.clock:
            self.start, self.end = self.clock(), self.clock()
            self.start.record()

    def __exit__(self, *_: object) -> None:
        """End, and wait for it."""
        if self.clock:
            self.end.record()
            torch.cuda.synchronize()
            self.into.append(self.start.elapsed_time(self.end))
        else:
            self.into.append(1e3 * (time.perf_counter() - self.begun))


def evaluate(runs: list[Run], windows: Tensor, device: torch.device) -> None:
    """The held-out loss of both, each with its own attention."""
    for one in runs:
        one.held_out.append((len(one.losses), mean_loss(one, windows, device)))


def mean_loss(one: Run, windows: Tensor, device: torch.device) -> float:
    """Mean over windows, in the graph that trains: without gradients another one would compile."""
    return statistics.fmean(
        loss_of(one, window[None].to(device).long(), device).item() for window in windows
    )


def densely(runs: list[Run], windows: Tensor) -> float:
    """The held-out loss of the sparse run's weights when every block is kept."""
    sparse = runs[1]
    device = next(sparse.model.parameters()).device
    afbs_compile.set_budget(sparse.model, dict.fromkeys(sparse.model.sites, 1.0))
    return mean_loss(sparse, windows, device)


def require_sparse(runs: list[Run]) -> None:
    """Nothing is compared unless attention was rewritten.

    Raises:
        CommandError: A site stayed dense.
    """
    wanted, found = len(runs[1].model.sites), explain().rewritten
    if found != wanted:
        raise CommandError(f"{found} of {wanted} attention layers run sparse; {explain()}")


def keep(
    args: Namespace, runs: list[Run], notes: list[str], output: Path | None
) -> dict[str, Any]:
    """The document of what is known, stored."""
    document = harness.document("pretrain", [one.row(args) for one in runs], notes)
    if output:
        harness.write(document, output)
    return document


def last(runs: list[Run]) -> str:
    """The newest losses, for people who wait."""
    return " / ".join(told(runs))


def told(runs: list[Run]) -> Iterator[str]:
    """The newest loss of each run."""
    for one in runs:
        yield f"{one.losses[-1]:.3f}" if one.losses else "–"


if __name__ == "__main__":
    sys.exit(script.main("pretrain"))
