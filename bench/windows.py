"""Which tokens are tuned on and which are measured? Windows of texts that share no token.

Measured windows are taken from a text's beginning, windows for tuning from its end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import text as texts
from afbs_compile.demo.model import LanguageModel

DEFAULT_TEXT = "python-docs"  # prose that every Python carries


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens int64 [n], and how many windows of it are measured."""

    name: str
    tokens: Tensor
    windows: int


def read(given: Sequence[str], windows: str, model: LanguageModel) -> list[Text]:
    """The texts of the command line.

    Args:
        given: `NAME=PATH` each; none takes Python's own documentation.
        windows: How many windows of a text are measured: one number, or one a text, with commas.
        model: Makes tokens.

    Raises:
        CommandError: A file cannot be read, or the counts do not fit the texts.
    """
    named = [split(one) for one in given]
    names = [name for name, _ in named] or [DEFAULT_TEXT]
    if len(set(names)) < len(names):
        raise CommandError(f"two texts share a name: {', '.join(names)}")
    bodies = [texts.read(path) for _, path in named] or [texts.default()]
    counts = numbers(windows, "--windows")
    if len(counts) not in (1, len(names)):
        raise CommandError(f"--windows has {len(counts)} numbers for {len(names)} texts")
    each = counts * len(names) if len(counts) == 1 else counts
    return [
        Text(name, model.tokens(body), count)
        for name, body, count in zip(names, bodies, each, strict=True)
    ]


def split(given: str) -> tuple[str, Path]:
    """`NAME=PATH`."""
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        raise CommandError(f"the text {given!r} has no name; give NAME=PATH")
    return name, Path(path)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers above 0, with commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise CommandError(f"{option} is {text!r}; give whole numbers above 0, with commas")
    return [int(part) for part in parts]


def measured(text: Text, length: int) -> list[Tensor]:
    """The windows [length] that are measured."""
    return texts.windows(text.tokens, length, text.windows)


def calibration(
    known: Iterable[Text], length: int, each: int, chosen: Sequence[str] | None = None
) -> Mapping[str, list[Tensor]]:
    """Windows [length] for tuning, by text: the last `each` of every chosen text.

    Raises:
        CommandError: A text is too short to leave its measured windows alone, or is unknown.
    """
    by_name = {text.name: text for text in known}
    names = list(by_name) if chosen is None else list(chosen)
    if unknown := [name for name in names if name not in by_name]:
        raise CommandError(f"no text {', '.join(unknown)}; there are {', '.join(by_name)}")
    for name in names:
        text = by_name[name]
        have, need = text.tokens.numel(), (text.windows + each) * length
        if have < need:
            raise CommandError(
                f"{name} has {have} tokens; {text.windows} measured windows and {each} for "
                f"tuning need {need}; give a longer text, or fewer --windows or --tokens"
            )
    return {
        name: list(by_name[name].tokens[-each * length :].view(each, length)) for name in names
    }


def in_turn(windows: Mapping[str, list[Tensor]]) -> list[Tensor]:
    """The first window of every text, then the second of every text, and so on."""
    return [window for group in zip(*windows.values(), strict=True) for window in group]
