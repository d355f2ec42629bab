"""Which attention of which models is rewritten, and is it right? The coverage matrix.

`python bench/coverage.py`, or `afbs bench coverage`. A row is a tiny random model run in one way.
With every block kept, its outputs (and gradients) are compared with the dense model's; with a
fixed tau, every call's with the plain-torch oracle's; tuned, every head's error with what was
promised.
"""

import copy
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from afbs_compile import cache
from afbs_compile.bench import forced, script, zoo, zoo_diffusion
from afbs_compile.bench.coverage_table import MAX_ERROR, wrong
from afbs_compile.bench.forced import Forced, distance
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.zoo import Cell, Entry, Inputs, Missing
from afbs_compile.capture import Stream
from afbs_compile.commands.errors import CommandError
from afbs_compile.evaluators import DirectEvaluator
from afbs_compile.policy import Head
from afbs_compile.problem import Problem
from afbs_compile.progress import Progress
from afbs_compile.report import JOURNAL
from afbs_compile.source import look_up
from afbs_compile.tuner.objective import FULL, u_of_tau

STARRED = ("Llama", "Qwen3", "Gemma-3", "ViT", "Flux", "SD3", "Wan")  # on a GPU as well
KEY = ("model", "length", "batch", "mask", "cache", "grad", "tuned")
ENTRIES: Mapping[str, Entry] = {**zoo.ENTRIES, **zoo_diffusion.ENTRIES}
TAU = 0.8
TUNED = Cell(1000)
WAYS = (  # what tells most comes first: a run that ends early has all models
    Cell(128, batch=3, mask="right"),
    Cell(1000, cache=True),
    Cell(128, grad=True),
    Cell(7),
    Cell(1000, mask="ones", cache=True),
    Cell(1000, batch=3, mask="left"),
    Cell(1),
    Cell(7, batch=3, mask="left", cache=True),
    Cell(1000, batch=3, mask="right", grad=True),
    Cell(128),
    Cell(7, mask="ones"),
    Cell(1, cache=True),
    Cell(1000),
    Cell(4096),
    Cell(4096, batch=3, mask="right"),
)


def cells(entry: Entry) -> list[Cell]:
    """How a model is run: what it knows nothing of is left out, and nothing comes twice."""
    ways = list(WAYS)
    if "mask" not in entry.knobs:
        ways = [replace(way, mask="none") for way in ways]
    if "cache" not in entry.knobs:
        ways = [replace(way, cache=False) for way in ways]
    return list(dict.fromkeys(ways))


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Run the cells that were asked for and are not known yet; kept in `output` row by row.

    Raises:
        CommandError: A model or length is unknown, or `output` cannot be continued.
    """
    place = placed(args.device, args.dtype)
    ledger = Ledger(place.file(), KEY, output, args.seconds)
    names = [n for n in chosen(args.models) if not args.starred or n in STARRED]
    steps = missing(names, args.longest, ledger)
    with Progress() as progress:
        absent: dict[str, str] = {}
        for done, row in enumerate(steps):
            if ledger.over():
                ledger.notes.append(f"{len(steps) - done} cells were left out for want of time")
                break
            name = row["model"]
            progress(done, len(steps), "cells", name)
            cell = Cell(**{f.name: row[f.name] for f in fields(Cell)})
            try:
                if name not in absent:
                    found = attempt(ENTRIES[name], cell, row["tuned"], args.inner, place)
                    ledger.add(row | found)
                    told = line(ledger.rows[-1])
                    progress.bars.console.print(
                        told, markup=False, highlight=False, soft_wrap=True
                    )
            except Missing as reason:
                absent[name] = f"{name} was skipped: {reason}"
    ledger.notes += absent.values()
    ledger.write()
    return ledger.document()


@dataclass(frozen=True, slots=True)
class Place:
    """Where models run, and in which precision."""

    device: torch.device
    dtype: torch.dtype

    @property
    def half(self) -> bool:
        """Whether rounding is larger than what float32 is held to."""
        return self.dtype != torch.float32

    def file(self) -> str:
        """Name of the result file."""
        return f"coverage_{self.device.type}{'_bf16' if self.half else ''}"

    def put(self, inputs: Any) -> Any:
        """Inputs there; numbers with a fraction in the precision."""

        def moved(x: Tensor) -> Tensor:
            return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

        return tree_map_only(Tensor, moved, inputs)


CPU = Place(torch.device("cpu"), torch.float32)


def placed(device: str, dtype: str) -> Place:
    """Where to run.

    Raises:
        CommandError: There is no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("there is no CUDA device here; leave --device out")
    return Place(torch.device(device), getattr(torch, dtype))


def missing(names: list[str], longest: int | None, ledger: Ledger) -> list[Row]:
    """Cells without a result: the first way of every model, then the second."""
    most = longest or max(way.length for way in WAYS)
    ways = {name: cells(ENTRIES[name]) for name in names}
    order = [
        {"model": name, **asdict(ways[name][n]), "tuned": False}
        for n in range(len(WAYS))
        for name in names
        if n < len(ways[name])
    ]
    order += [{"model": name, **asdict(TUNED), "tuned": True} for name in names]
    return [row for row in order if row["length"] <= most and not ledger.has(row)]


def chosen(names: str | None) -> list[str]:
    """The models that were asked for, with commas; all by default.

    Raises:
        CommandError: One is unknown.
    """
    if names is None:
        return list(ENTRIES)
    asked = [name.strip() for name in names.split(";")]
    if unknown := [name for name in asked if name not in ENTRIES]:
        raise CommandError(f"no model {unknown[0]!r}; there are {'; '.join(ENTRIES)}")
    return asked


def attempt(
    entry: Entry, cell: Cell, tuned: bool, inner: str = "eager", place: Place = CPU
) -> Row:
    """What came of a cell; an exception is a result as well.

    Raises:
        Missing: The model cannot be built here.
    """
    begun = time.process_time()
    found: Row = dict.fromkeys(
        ("sites", "rewritten", "short", "kept_error", "policy_error", "policy_change",
         "grad_error", "head_error", "graphs", "graphs_dense", "dense_error", "dense_grad_error")
    ) | {
        "reasons": {}, "failure": None, "inner": inner,
        "dtype": str(place.dtype).removeprefix("torch."),
    }  # fmt: skip
    try:
        found |= (promise if tuned else exactness)(entry, cell, inner, place)
    except Missing:
        raise
    except Exception as error:
        found["failure"] = f"{type(error).__name__}: {error}"[:300]
    return found | {"cpu_seconds": round(time.process_time() - begun, 2)}


def exactness(entry: Entry, cell: Cell, inner: str, place: Place = CPU) -> Row:
    """The errors of a cell under thresholds that are set, not tuned.

    In half precision all are compared with the same weights in float32, the dense model too.
    """
    module, inputs = built(entry, cell, place)
    want, want_grad = dense, dense_grad = outputs(module, module, inputs, cell)
    if place.half:
        exact = copy.deepcopy(module).float()
        want, want_grad = outputs(
            exact, exact, Place(place.device, torch.float32).put(inputs), cell
        )
    graphs: list[Any] = []
    outputs(torch.compile(module, backend=forced.counting(graphs)), module, inputs, cell)
    torch._dynamo.reset()
    with forced.forced(forced.every(1.0), inner) as force:
        compiled = afbs(module, cell, force)
        kept, kept_grad = outputs(compiled, module, inputs, cell)
        found = reported(entry, cell)
        forward = replace(cell, grad=False)
        changed, policy_errors = None, []
        # the oracle stands for a processor's kernel alone
        if found["rewritten"] and not cell.grad and place.device.type == "cpu":
            force.move(forced.every(TAU))
            with forced.compared() as policy_errors:
                changed, _ = outputs(compiled, module, inputs, forward)
        made = force.graphs
    return found | {
        "kept_error": worst(kept, want),
        "policy_error": max(policy_errors, default=None),
        "policy_change": None if changed is None else worst(changed, want),
        "grad_error": worst(kept_grad, want_grad) if cell.grad else None,
        "dense_error": worst(dense, want) if place.half else None,
        "dense_grad_error": worst(dense_grad, want_grad) if place.half and cell.grad else None,
        "graphs": made,
        "graphs_dense": len(graphs),
    }


def promise(entry: Entry, cell: Cell, inner: str, place: Place = CPU) -> Row:
    """The largest error of a head of a tuned model, run by the kernel, where `MAX_ERROR` holds."""
    module, inputs = built(entry, cell, place)
    want, _ = outputs(module, module, inputs, cell)
    with forced.forced(None, inner) as force:
        tuned, _ = outputs(afbs(module, cell, force), module, inputs, cell)
        found = reported(entry, cell)
        found["sites"] = found["rewritten"] = found["short"] = 0  # counted where nothing is tuned
        found["reasons"] = {}
        errors = [e for key, ps in force.problems.items() for p in ps for e in head_errors(key, p)]
    return found | {
        "policy_change": worst(tuned, want),
        "head_error": max(errors, default=0.0),
        "sparse_heads": len(errors),
    }


def head_errors(key: str, problem: Problem) -> Iterator[float]:
    """Measured errors of the sparse heads of what was tuned for a problem."""
    known, _ = look_up(cache.load(key, problem.options.cache_folder), problem)
    stream = Stream(problem.gm, problem.inputs[0], problem.sites)
    for site in problem.sites:
        heads: tuple[Head, ...] = known.sites[site.name].heads if known else ()
        if any(head.mode == "sparse" for head in heads):
            direct = DirectEvaluator(stream, site.name, site.heads, problem.options.selector)
            found = direct(u_of_tau(np.array([min(h.tau, 0.9999) for h in heads])), FULL)
            errors = zip(found.error, heads, strict=True)
            yield from (float(e) for e, head in errors if head.mode == "sparse")


def built(entry: Entry, cell: Cell, place: Place = CPU) -> tuple[nn.Module, Inputs]:
    """A cell's model and inputs, the same every time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = entry.build(cell)
    return module.to(place.device, place.dtype), place.put(inputs)


def afbs(module: nn.Module, cell: Cell, force: Forced) -> Callable[..., Any]:
    """The model under our backend; a token that is decoded from a cache is left dense."""
    options: dict[str, Any] = {"min_length": 2 if cell.cache else 1, "cache_dir": force.cache_dir}
    if force.heads is None:
        options["max_error"] = MAX_ERROR
    return torch.compile(module, backend="afbs", options=options)


def outputs(
    call: Callable[..., Any], module: nn.Module, inputs: Inputs, cell: Cell
) -> tuple[list[Tensor], list[Tensor]]:
    """What a model says, and with `grad` the gradients of its weights, as one vector."""
    with torch.set_grad_enabled(cell.grad):
        first = call(**inputs)
        said = [main(first)]
        if cell.cache:
            said.append(main(call(**following(inputs, first))))
    if not cell.grad:
        return said, []
    module.zero_grad()
    loss = said[0].nan_to_num().square().mean()
    torch.autograd.backward(loss)
    weights = [w.grad.flatten() for w in module.parameters() if w.grad is not None]
    return [s.detach() for s in said], [torch.cat(weights)]


def following(inputs: Inputs, first: Any) -> Inputs:
    """The call that decodes one more token."""
    tokens = next(name for name in ("decoder_input_ids", "input_ids") if name in inputs)
    masks = ("decoder_attention_mask", "attention_mask")
    mask = next((n for n in masks if n in inputs and (n != masks[1] or len(inputs) == 3)), None)
    more = {tokens: inputs[tokens][:, :1], "past_key_values": first.past_key_values}
    if mask:
        one = torch.ones_like(inputs[mask][:, :1])
        more[mask] = torch.cat([inputs[mask], one], 1)
    return inputs | more


def main(output: Any) -> Tensor:
    """The tensor that a model's output is about."""
    if isinstance(output, Tensor):
        return output
    for name in ("last_hidden_state", "logits_per_text"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    first: Tensor = output[0]
    return first


def worst(found: list[Tensor], wanted: list[Tensor] | None) -> float:
    """The largest distance of any output."""
    return max(distance(f, w) for f, w in zip(found, wanted or [], strict=True))


def reported(entry: Entry, cell: Cell) -> Row:
    """What became of the cell's attention calls, `short` ones apart; calls unseen are missed."""
    sites = JOURNAL.report().sites
    short = [s for s in sites if (s.reason or "").startswith("short:")]
    others = [s for s in sites if s not in short]
    reasons: dict[str, int] = {}
    for site in others:
        if site.decision != "sparse":
            reasons[site.reason or site.decision] = reasons.get(site.reason or "", 0) + 1
    missed = entry.sites * (2 if cell.cache else 1) - len(sites)
    if missed > 0:
        reasons["not seen"] = missed
    return {
        "sites": len(others) + max(missed, 0),
        "rewritten": sum(site.decision == "sparse" for site in others),
        "short": len(short),
        "reasons": reasons,
    }


def line(row: Row) -> str:
    """A row for people who wait."""
    way = f"{row['model']} {row['length']}×{row['batch']}"
    way += "".join(f" {name}" for name in ("cache", "grad", "tuned") if row[name])
    said = f"{way} mask {row['mask']}: {row['rewritten']} of {row['sites']} sites"
    reasons = "".join(f"; {count} × {reason}" for reason, count in row["reasons"].items())
    return f"{said}{reasons}; {wrong(row) or 'right'}; {row['cpu_seconds']} s"


if __name__ == "__main__":
    sys.exit(script.main("coverage"))
