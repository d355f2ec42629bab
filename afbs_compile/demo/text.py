"""Which text does the demo read? English prose that every Python carries, or the user's file.

The prose is the language reference in `pydoc_data.topics`. Sections recur there in several topics;
every paragraph is taken once, so that two windows never share one.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from torch import Tensor

from afbs_compile.commands.errors import CommandError

LEAST_CHARACTERS = 80
LEAST_LETTERS = 0.9  # share of letters and spaces in prose; code and grammar have less


def default() -> str:
    """The prose of the Python language reference, topics in alphabetical order."""
    paragraphs = (p for name in sorted(topics) for p in prose(topics[name]))
    return "\n\n".join(dict.fromkeys(paragraphs))


def prose(raw: str) -> Iterator[str]:
    """The paragraphs of a reStructuredText page that are sentences, each on one line."""
    for block in re.split(r"\n\s*\n", raw):
        paragraph = re.sub(r"^(\*|\d+\.) ", "", " ".join(block.split()))
        if is_prose(paragraph):
            yield paragraph


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences rather than code, grammar or a heading."""
    if len(paragraph) < LEAST_CHARACTERS or not paragraph.endswith("."):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return letters >= LEAST_LETTERS * len(paragraph) and "::=" not in paragraph


def read(path: Path) -> str:
    """The user's text.

    Raises:
        CommandError: The file cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the text {path} cannot be read: {error}") from error


def windows(tokens: Tensor, length: int, count: int) -> list[Tensor]:
    """The first `count` windows [length] of `tokens` [n]; they do not overlap.

    Raises:
        CommandError: The text is too short.
    """
    if length < 1:
        raise CommandError(f"--tokens is {length}; give at least 1")
    if tokens.numel() < count * length:
        raise CommandError(
            f"the text has {tokens.numel()} tokens, {count} windows of {length} need "
            f"{count * length}; give a longer --text or fewer --tokens"
        )
    return list(tokens[: count * length].view(count, length).unbind())
