"""How often does an unseen document break the bound? By calibration documents and margin.

Run: python bench/unseen.py --model DIR --text FILE

Layers of a language model are profiled on windows spread over a text. Every choice of one,
two or three of them is calibrated on: each head takes the least threshold whose error is at most
margin × max_error on all of them. What is above max_error on the others is counted.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afbs_compile.bench import harness
from afbs_compile.bench.tuner_sites import Documents, subject
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model as models
from afbs_compile.demo import text as texts
from afbs_compile.options import parse
from afbs_compile.progress import Progress
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.objective import FULL, U_MAX

MARGINS = (1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
STEPS = 0.02  # of u
MORE = 1.1  # how far above max_error is far above
Row = dict[str, Any]


def curves(sites: Mapping[str, Documents], u: Floats) -> tuple[Floats, Floats]:
    """Error and density `[windows, u, heads]` of all heads of all sites."""
    errors, densities = [], []
    for site in sites.values():
        found = [[w(np.full(w.heads, one), FULL) for one in u] for w in site.windows]
        errors.append([[m.error for m in window] for window in found])
        densities.append([[m.density for m in window] for window in found])
    return np.concatenate(errors, -1), np.concatenate(densities, -1)


def least(error: Floats, cap: float) -> np.ndarray:
    """The first place on axis 0 from which on `error` `[u, heads]` stays at or below `cap`."""
    over = error > cap
    last = len(over) - np.argmax(over[::-1], 0)
    return np.minimum(np.where(over.any(0), last, 0), len(over) - 1)


def rows(error: Floats, density: Floats, max_errors: tuple[float, ...]) -> Iterator[Row]:
    """One for every max_error, number of documents and margin; means over all choices."""
    windows, _, heads = error.shape
    for max_error, count, margin in itertools.product(max_errors, (1, 2, 3), MARGINS):
        over, far, kept = [], [], []
        for chosen in itertools.combinations(range(windows), count):
            others = [n for n in range(windows) if n not in chosen]
            at = least(error[list(chosen)].max(0), margin * max_error)
            unseen = error[others][:, at, np.arange(heads)]
            over.append(np.mean(unseen > max_error))
            far.append(np.mean(unseen > MORE * max_error))
            kept.append(density[others][:, at, np.arange(heads)].mean())
        yield {
            "max_error": max_error,
            "documents": count,
            "margin": margin,
            "choices": len(over),
            "heads": heads,
            "heldout_over": float(np.mean(over)),
            "heldout_over_1_1": float(np.mean(far)),
            "density": float(np.mean(kept)),
        }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profile, choose, count.

    Raises:
        CommandError: The text is too short, or the model cannot be profiled.
    """
    load = models.from_folder if args.model else models.smollm2
    model = load(args.model or parse().cache_folder, torch.float32)
    tokens = model.tokens(texts.read(args.text))
    if len(tokens) < args.windows * args.tokens or args.windows < 4:
        raise CommandError(
            f"{args.text} has {len(tokens)} tokens; give a text of --windows {args.windows} "
            f"(4 or more) × --tokens {args.tokens}"
        )
    starts = np.linspace(0, len(tokens) - args.tokens, args.windows).astype(int)
    windows = [tokens[start : start + args.tokens] for start in starts]
    with Progress() as progress:
        found = subject(model, windows, [len(windows)], args.layers, progress)
    error, density = curves(found.calibration[len(windows)], np.arange(0, U_MAX, STEPS))
    shared = {"model": found.model, "text": args.text.stem, "tokens": args.tokens}
    made = [shared | row for row in rows(error, density, (0.05, 0.1))]
    return harness.document("unseen", made)


def main() -> int:
    """Measure and store among the committed results."""
    parser = argparse.ArgumentParser(description="How often is the bound broken on unseen text?")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: SmolLM2-135M")
    parser.add_argument("--text", type=Path, metavar="FILE", required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of a window (4096)")
    parser.add_argument("--windows", type=int, default=8, help="of the text (8)")
    parser.add_argument("--layers", type=int, default=6, help="that are profiled (6)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write unseen.json there")
    args = parser.parse_args()
    try:
        harness.write(run(args), args.output or harness.RESULTS)
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
