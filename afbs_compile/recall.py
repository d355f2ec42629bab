"""Which texts ask a model for something it has read? A needle, a pair of keys, a repetition.

Perplexity on prose is mostly local and hardly tells whether far blocks are found; these do. Every
problem is one sequence of exactly so many tokens whose last tokens are the answer.
"""

import random
from collections.abc import Callable
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
    city, number = draw.choice(CITIES), f"{draw.randrange(10**4, 10**5)}"
    said = f"The secret number of {city} is"
    return problem(
        "needle",
        depth,
        filler,
        hidden=tokens(f"\n\n{said} {number}.\n\n"),
        asked=tokens(f"\n\nAs was said before, the secret number of {city} is"),
        answer=tokens(f" {number}"),
    )


def key_value(tokens: Tokens, filler: Tensor, depth: float, seed: int) -> Problem:
    """An object of `PAIRS` random pairs in filler text, and one of its keys again at the end."""
    draw = random.Random(f"key_value {seed} {depth}")
    keys = [f"{key:04x}" for key in draw.sample(range(16**4), PAIRS)]
    values = [f"{draw.randrange(10**4, 10**5)}" for _ in keys]
    pairs = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    chosen = draw.randrange(PAIRS)
    return problem(
        "key_value",
        depth,
        filler,
        hidden=tokens("\n\n{" + ", ".join(pairs) + "}\n\n"),
        asked=tokens(f'\n\nOf the pairs above, again one: {{"{keys[chosen]}": "'),
        answer=tokens(values[chosen]),
    )


def copy(tokens: Tokens, filler: Tensor, depth: float, seed: int) -> Problem:
    """Random tokens of the filler's vocabulary, and their beginning again at the end."""
    draw = random.Random(f"copy {seed} {depth}")
    passage = filler[[draw.randrange(len(filler)) for _ in range(COPIED)]]
    mark = tokens("\n\n>>> ")
    return problem(
        "copy",
        depth,
        filler,
        hidden=torch.cat([mark, passage, tokens("\n\n")]),
        asked=torch.cat([mark, passage[:LEAD]]),
        answer=passage[LEAD:],
    )


TASKS: dict[str, Callable[[Tokens, Tensor, float, int], Problem]] = {
    "needle": needle,
    "key_value": key_value,
    "copy": copy,
}


def problem(
    task: str, depth: float, filler: Tensor, *, hidden: Tensor, asked: Tensor, answer: Tensor
) -> Problem:
    """`hidden` at a depth of as much filler as leaves the length that of `filler`.

    Raises:
        CommandError: There is no room for filler.
    """
    room = len(filler) - len(hidden) - len(asked) - len(answer)
    if room < 0:
        raise CommandError(f"{task} does not fit into {len(filler)} tokens; give more --tokens")
    before = round(depth * room)
    parts = [filler[:before], hidden, filler[before:room], asked, answer]
    return Problem(task, depth, torch.cat(parts), len(answer))


def problems(tasks: list[str], tokens: Tokens, filler: Tensor, seed: int) -> list[Problem]:
    """The problems of one window of filler, a depth after the other."""
    return [TASKS[task](tokens, filler, depth, seed) for task in tasks for depth in DEPTHS]
