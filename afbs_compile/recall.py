"""Which texts ask a model for something it has read? A needle, a pair of keys, a repetition.

Perplexity on prose is mostly local and hardly tells whether far blocks are found; these do. Every
problem is one sequence of exactly so many tokens whose last tokens are the answer. What is hidden
and asked is a `Fact`; `quiz` hides several of them in one document.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.commands.errors import CommandError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Osaka", "Accra")
PAIRS = 24  # of the key-value problem
COPIED = 48  # tokens that are repeated
LEAD = 8  # of these, shown again before the model must go on
Tokens = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Fact:
    """What a document says once and is asked for later, as tokens int64 [n] each.

    Attributes:
        hidden: What stands in the document.
        asked: What stands at its end.
        answer: What comes next.
    """

    hidden: Tensor
    asked: Tensor
    answer: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """A sequence that ends in its answer.

    Attributes:
        task: What it asks for.
        depth: Where the thing asked for stands in the filler, 0 to 1.
        ids: int64 `[n]`, the answer included.
        answer: How many tokens at the end are the answer.
    """

    task: str
    depth: float
    ids: Tensor
    answer: int


def needle(tokens: Tokens, filler: Tensor, depth: float, seed: int) -> Problem:
    """A sentence with a number in filler text, and its beginning again at the end."""
    draw = random.Random(f"needle {seed} {depth}")
    return problem("needle", depth, filler, secret(tokens, draw.choice(CITIES), draw))


def secret(tokens: Tokens, city: str, draw: random.Random) -> Fact:
    """A random number of five digits for a city."""
    number = f"{draw.randrange(10**4, 10**5)}"
    return Fact(
        hidden=tokens(f"\n\nThe secret number of {city} is {number}.\n\n"),
        asked=tokens(f"\n\nAs was said before, the secret number of {city} is"),
        answer=tokens(f" {number}"),
    )


def key_value(tokens: Tokens, filler: Tensor, depth: float, seed: int) -> Problem:
    """An object of `PAIRS` random pairs in filler text, and one of its keys again at the end."""
    draw = random.Random(f"key_value {seed} {depth}")
    pairs = random_pairs(draw)
    return problem("key_value", depth, filler, lookup(tokens, pairs, draw.choice(list(pairs))))


def random_pairs(draw: random.Random) -> dict[str, str]:
    """`PAIRS` hexadecimal keys and numbers."""
    keys = [f"{key:04x}" for key in draw.sample(range(16**4), PAIRS)]
    return {key: f"{draw.randrange(10**4, 10**5)}" for key in keys}


def lookup(tokens: Tokens, pairs: Mapping[str, str], key: str) -> Fact:
    """All pairs, of which one is asked for."""
    told = ", ".join(f'"{key}": "{value}"' for key, value in pairs.items())
    return Fact(
        hidden=tokens(f"\n\n{{{told}}}\n\n"),
        asked=tokens(f'\n\nOf the pairs above, again one: {{"{key}": "'),
        answer=tokens(pairs[key]),
    )


def copy(tokens: Tokens, filler: Tensor, depth: float, seed: int) -> Problem:
    """Random tokens of the filler's vocabulary, and their beginning again at the end."""
    draw = random.Random(f"copy {seed} {depth}")
    return problem("copy", depth, filler, passage(tokens, filler, draw))


def passage(tokens: Tokens, filler: Tensor, draw: random.Random) -> Fact:
    """Random tokens, of which the first are shown again."""
    drawn = filler[[draw.randrange(len(filler)) for _ in range(COPIED)]]
    mark = tokens("\n\n>>> ")
    return Fact(
        hidden=torch.cat([mark, drawn, tokens("\n\n")]),
        asked=torch.cat([mark, drawn[:LEAD]]),
        answer=drawn[LEAD:],
    )


TASKS: dict[str, Callable[[Tokens, Tensor, float, int], Problem]] = {
    "needle": needle,
    "key_value": key_value,
    "copy": copy,
}


def problem(task: str, depth: float, filler: Tensor, fact: Fact) -> Problem:
    """A fact hidden at a depth of as much filler as leaves the length that of `filler`.

    Raises:
        CommandError: There is no room for filler.
    """
    room = len(filler) - len(fact.hidden) - len(fact.asked) - len(fact.answer)
    if room < 0:
        raise CommandError(f"{task} does not fit into {len(filler)} tokens; give more --tokens")
    before = round(depth * room)
    parts = [filler[:before], fact.hidden, filler[before:room], fact.asked, fact.answer]
    return Problem(task, depth, torch.cat(parts), len(fact.answer))


def problems(tasks: list[str], tokens: Tokens, filler: Tensor, seed: int) -> list[Problem]:
    """The problems of one window of filler, a depth after the other."""
    return [TASKS[task](tokens, filler, depth, seed) for task in tasks for depth in DEPTHS]
