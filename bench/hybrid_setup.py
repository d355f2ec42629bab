"""Which documents does a search read, which decide among its choices, and which judge these?

No two of the three share a token of text or a question.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

from afbs_compile.bench import windows
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo.model import LanguageModel
from afbs_compile.hybrid_calibration import samples
from afbs_compile.hybrid_subject import Subject, Wishes, subject

HELD_SEED = 500  # of questions that decide among a search's best choices
UNSEEN_SEED = 1000  # of questions that no search asks
SELDOM = 0.1  # share of the memory for what is evaluated seldom


@dataclass(frozen=True, slots=True)
class Setup:
    """A model with documents to search on and documents to measure on."""

    model: LanguageModel
    args: Namespace
    tokens: int
    window: int
    seen: Subject
    unseen: Subject
    held: Subject | None

    def wishes(self, ratio: float, seed: int) -> Wishes:
        """What a search is asked."""
        args = self.args
        return Wishes(
            ratio, self.window, args.sink, args.budget, args.objective, args.prior,
            args.solver, seed, None, args.seconds, args.cache_dir,
        )  # fmt: skip

    def subjects(self) -> list[Subject]:
        """All that have a store."""
        return [self.seen, self.unseen, *([self.held] if self.held else [])]


def setup(
    model: LanguageModel, texts: list[Text], args: Namespace, tokens: int, window: int
) -> Setup:
    """Documents of one length, from the texts' ends to search on, from their beginnings not."""
    count = args.documents + args.held
    known = windows.in_turn(windows.calibration(texts, tokens, math.ceil(count / len(texts))))
    searched, held = known[: args.documents], known[args.documents : count]
    measured = windows.in_turn({t.name: windows.measured(t, tokens) for t in texts})
    wishes = Wishes(0.5, window, args.sink, cache_dir=args.cache_dir)
    asked = [
        (searched, args.tasks, 0, 1.0),
        (measured[: args.unseen], args.measure, UNSEEN_SEED, SELDOM),
        *([(held, args.tasks, HELD_SEED, SELDOM)] if args.held else []),
    ]
    try:
        ready = [
            subject(
                model.module, samples(model, read, tasks.split(","), window, seed), wishes,
                share / args.sharing,
            )
            for read, tasks, seed, share in asked
        ]  # fmt: skip
    except ValueError as error:
        raise CommandError(f"{model.name} cannot be made hybrid: {error}") from error
    seen, unseen, *others = ready
    return Setup(model, args, tokens, window, seen, unseen, others[0] if others else None)
