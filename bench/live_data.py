"""Which micro-batches are there to balance? Documents of a source that are about equally long.

A sample is `rows` documents of one source, neighbours by length, cut to the shortest of them and
down to a length bucket of policies (less than a fifth is lost): batches of one length need no
padding. Lengths keep the long tail that the documents have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afbs_compile.bench.pretrain_text import Source
from afbs_compile.commands.errors import CommandError
from afbs_compile.policy import bucket_of

STRIDE = 128  # tokens: a query block


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents side by side: bytes `[rows, length + 1]`, and the number of their source."""

    tokens: Tensor
    source: int

    @property
    def length(self) -> int:
        """Tokens of a row that are predicted."""
        return int(self.tokens.shape[1]) - 1


def samples(sources: Sequence[Source], rows: int, shortest: int, longest: int) -> list[Sample]:
    """All samples, source by source, short ones first.

    Raises:
        CommandError: A source has too few documents of `shortest` bytes or more.
    """
    found = []
    for number, source in enumerate(sources):
        long_enough = [d for d in source.documents if len(d) > shortest]
        ranked = sorted(long_enough, key=len)
        groups = [ranked[n : n + rows] for n in range(0, len(ranked) - rows + 1, rows)]
        if not groups:
            raise CommandError(
                f"{source.name} has {len(ranked)} documents of more than {shortest} bytes and "
                f"{rows} make a micro-batch; give more --text, or a smaller --shortest or --rows"
            )
        for group in groups:
            length = usable(min(len(group[0]) - 1, longest))
            cut = b"".join(document[: length + 1] for document in group)
            found.append(Sample(as_bytes(cut).view(rows, length + 1), number))
    return found


def usable(length: int) -> int:
    """The longest multiple of `STRIDE` up to `length` that is a length bucket."""
    whole = max(length // STRIDE, 1) * STRIDE
    while bucket_of(whole) != whole:
        whole -= STRIDE
    return whole


def as_bytes(text: bytes) -> Tensor:
    """uint8 [n]."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def divided(every: list[Sample], wanted: int, held_out: int, seed: int) -> list[Sample]:
    """`wanted` samples to train on, by seed, of those that are held out under no seed.

    Raises:
        CommandError: There are too few.
    """
    rest = sorted(set(range(len(every))) - set(spread(len(every), held_out)))
    if len(rest) < wanted:
        raise CommandError(
            f"{len(rest)} micro-batches can be made of the text, {wanted} are needed; give more "
            "--text, or fewer --steps, --micro-batches or --rows"
        )
    chosen = np.random.default_rng([seed, 7]).choice(rest, wanted, replace=False)
    return [every[n] for n in chosen]


def spread(count: int, held_out: int) -> list[int]:
    """The numbers of the samples that are held out: evenly over sources and lengths."""
    return [(2 * n + 1) * count // (2 * held_out) for n in range(held_out)]
