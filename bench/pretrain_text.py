"""Which text is trained on? Documents that every Python carries, or the user's files, as bytes.

Code is the standard library's sources, cut where a top-level function or class begins; prose is
Python's documentation, a topic a document. Lengths of both have long tails by nature.
"""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from afbs_compile.bench.windows import split
from afbs_compile.commands.errors import CommandError

SUFFIXES = {".py", ".txt", ".md", ".rst", ".raw"}
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings"}
BEGINS = re.compile(r"(?m)^(?=(?:async def|def|class|@)\W?\w|CHAPTER | = )")


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of text: its name and its documents."""

    name: str
    documents: list[bytes]


def read(given: Sequence[str]) -> list[Source]:
    """The sources of the command line.

    Args:
        given: `NAME=PATH` each, a file or a folder, or `NAME=stdlib`, the standard library's
            sources; a name may come again, and none at all takes what Python carries.

    Raises:
        CommandError: A path cannot be read, or holds no text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    if not given:
        prose = [topics[name].encode() for name in sorted(topics)]
        return [Source("code", of_path(library)), Source("prose", prose)]
    found: dict[str, Source] = {}
    for name, path in map(split, given):
        parts = of_path(library if path == Path("stdlib") else path)
        found.setdefault(name, Source(name, [])).documents.extend(parts)
    if empty := [source.name for source in found.values() if not source.documents]:
        raise CommandError(f"no text below {', '.join(empty)}; files end in {sorted(SUFFIXES)}")
    return list(found.values())


def of_path(path: Path) -> list[bytes]:
    """The documents of a file, or of all text files below a folder.

    Raises:
        CommandError: Nothing is there.
    """
    if not path.exists():
        raise CommandError(f"the text {path} does not exist")
    files = sorted(files_below(path)) if path.is_dir() else [path]
    return [part for file in files for part in documents(file)]


def files_below(folder: Path) -> Iterator[Path]:
    """Text files, without tests and installed packages."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts[:-1]
        if path.suffix in SUFFIXES and not SKIPPED.intersection(inside) and path.is_file():
            yield path


def documents(file: Path) -> list[bytes]:
    """A file cut where something begins: a function, a class, a chapter, a headed section."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [part.encode() for part in BEGINS.split(text) if part.strip()]


def stream(sources: Sequence[Source]) -> Tensor:
    """All documents in their order, uint8 [n]."""
    whole = b"\n".join(part for source in sources for part in source.documents)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def windows(text: Tensor, length: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Windows `[n, length]` to train on, and `held_out` others, evenly spread over the text.

    Raises:
        CommandError: The text is too short.
    """
    count = text.numel() // length
    if count < 2 * held_out:
        raise CommandError(
            f"the text has {text.numel()} bytes: {count} windows of {length}, and {held_out} are "
            "held out; give more --text or fewer --tokens"
        )
    every = text[: count * length].view(count, length)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.arange(held_out) * count // held_out] = True
    return every[~chosen], every[chosen]


def order(count: int, steps: int, batch: int, seed: int) -> Tensor:
    """Which windows each step reads, int64 `[steps, batch]`: permutation after permutation."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // count)
    found = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return torch.from_numpy(found[: steps * batch]).view(steps, batch)
