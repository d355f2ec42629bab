"""Which questions is a document asked? Several about several facts that it holds.

One answer is a handful of predictions, and so few of them tell heads apart by luck. More facts in
the same document cost nothing: the document is read once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from afbs_compile import recall
from afbs_compile.commands.errors import CommandError
from afbs_compile.recall import CITIES, DEPTHS, Fact, Tokens

QUESTIONS = 8
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
TRADES = ("baker", "carpenter", "doctor", "farmer", "lawyer", "painter", "sailor", "teacher")


@dataclass(frozen=True, slots=True, eq=False)
class Quiz:
    """A document that ends in questions and their answers.

    Attributes:
        ids: int64 `[n]`.
        places: Of the answers' tokens, ascending int64 `[answers]`.
        questions: Which question each of them answers `[answers]`, from 0.
    """

    ids: Tensor
    places: Tensor
    questions: Tensor


def needle(tokens: Tokens, filler: Tensor, draw: random.Random) -> list[Fact]:
    """Numbers of cities."""
    return [recall.secret(tokens, city, draw) for city in draw.sample(CITIES, QUESTIONS)]


def key_value(tokens: Tokens, filler: Tensor, draw: random.Random) -> list[Fact]:
    """Pairs of one object."""
    pairs = recall.random_pairs(draw)
    return [recall.lookup(tokens, pairs, key) for key in draw.sample(list(pairs), QUESTIONS)]


def copy(tokens: Tokens, filler: Tensor, draw: random.Random) -> list[Fact]:
    """Passages of random tokens."""
    return [recall.passage(tokens, filler, draw) for _ in range(QUESTIONS)]


def people(tokens: Tokens, filler: Tensor, draw: random.Random) -> list[Fact]:
    """Who works as what, and where: words that are names, not random signs."""
    found = []
    cities, trades = draw.sample(CITIES, QUESTIONS), draw.sample(TRADES, QUESTIONS)
    for name, city, trade in zip(draw.sample(NAMES, QUESTIONS), cities, trades, strict=True):
        said = f"{name} is a {trade} from {city}."
        found.append(Fact(tokens(f"\n\n{said}\n\n"), tokens(f"\n\nWho is {name}? {name} is a"),
                          tokens(f" {trade} from {city}.")))  # fmt: skip
    return found


QUIZZES: dict[str, Callable[[Tokens, Tensor, random.Random], list[Fact]]] = {
    "needle": needle,
    "key_value": key_value,
    "copy": copy,
    "people": people,
}


def quiz(task: str, tokens: Tokens, filler: Tensor, depth: float, seed: int, most: int) -> Quiz:
    """As many questions of a task as fit, at least one, in as many tokens as `filler` has [n].

    Facts stand at even distances, one after the other; one that all questions share stands at
    `depth`, 0 to 1. They are asked for in any order.

    Args:
        task: Of `QUIZZES`.
        tokens: Makes them of a text.
        filler: The document around the facts.
        depth: Of what is asked of several times.
        seed: Of the facts.
        most: Tokens that questions and answers may take, unless one alone needs more.

    Raises:
        CommandError: There is no room for one question.
    """
    draw = random.Random(f"quiz {task} {seed}")
    facts = fitting(QUIZZES[task](tokens, filler, draw), min(most, len(filler) // 4))
    pieces = distinct(facts)
    told = [*draw.sample(facts, len(facts))]
    room = len(filler) - sum(map(len, pieces)) - sum(map(needed, told))
    if room < 0:
        raise CommandError(f"{task} does not fit into {len(filler)} tokens; give more --tokens")
    body = spread(filler[:room], pieces, depth)
    return written(body, told)


def fitting(facts: Sequence[Fact], most: int) -> list[Fact]:
    """The first facts whose questions and answers take at most so many tokens; one at least."""
    ends = torch.tensor([needed(fact) for fact in facts]).cumsum(0)
    return list(facts[: max(1, int((ends <= most).sum()))])


def needed(fact: Fact) -> int:
    """Tokens of a question and its answer."""
    return len(fact.asked) + len(fact.answer)


def distinct(facts: Sequence[Fact]) -> list[Tensor]:
    """What is hidden, once where all facts hide the same."""
    if all(torch.equal(fact.hidden, facts[0].hidden) for fact in facts):
        return [facts[0].hidden]
    return [fact.hidden for fact in facts]


def spread(filler: Tensor, pieces: Sequence[Tensor], depth: float) -> list[Tensor]:
    """Filler with the pieces in it: a single one at `depth`, several at even distances."""
    count = len(pieces)
    depths = [depth] if count == 1 else [(n + 0.5) / count for n in range(count)]
    cuts = [0, *(round(x * len(filler)) for x in depths), len(filler)]
    parts = [filler[a:b] for a, b in pairwise(cuts)]
    return [x for pair in zip(parts, [*pieces, filler[:0]], strict=True) for x in pair]


def written(body: Sequence[Tensor], asked: Sequence[Fact]) -> Quiz:
    """The document, and where its answers are."""
    parts, places, questions = list(body), [], []
    length = sum(map(len, parts))
    for n, fact in enumerate(asked):
        start = length + len(fact.asked)
        length = start + len(fact.answer)
        parts += [fact.asked, fact.answer]
        places.append(torch.arange(start, length))
        questions.append(torch.full((len(fact.answer),), n))
    return Quiz(torch.cat(parts), torch.cat(places), torch.cat(questions))


def depth_of(n: int) -> float:
    """The depth of the n-th document."""
    return DEPTHS[n % len(DEPTHS)]
