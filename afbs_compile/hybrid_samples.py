"""What are windowed heads judged on? Calls of the model, and which predictions count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afbs_compile.damage import POSITIONS, next_tokens

Input = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One call, of one document or of several of equal length.

    Attributes:
        inputs: What the model is called with.
        task: What the call stands for; tasks weigh equally in a loss.
        counted: Rows of the logits `[N, V]` that count, int64 [R]; None takes rows evenly.
        targets: The token that each counted row should predict, int64 [R]; None takes the next
            token of the input, if the input holds the tokens.
        answers: Which question a counted row answers, int64 [R]: a question is right if all of its
            rows are. None: every row is a question.
    """

    inputs: Input
    task: str = "text"
    counted: Tensor | None = None
    targets: Tensor | None = None
    answers: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What counts of the logits of one call, on their device.

    Attributes:
        rows: Which rows `[R]`.
        targets: What each should predict `[R]`, −1 where that is unknown.
        answers: Its question `[R]`, counted from 0.
        questions: How many there are.
    """

    rows: Tensor
    targets: Tensor
    answers: Tensor
    questions: int


def wanted(sample: Sample, logits: Tensor, args: Sequence[Any]) -> Wanted:
    """What counts of a call's logits.

    Args:
        sample: The call.
        logits: What it gave, `[..., V]`.
        args: The graph's inputs, among which its tokens may be.

    Raises:
        ValueError: The sample's tensors do not fit the logits.
    """
    total, device = logits.flatten(0, -2).shape[0], logits.device
    rows = sample.counted
    if rows is None:
        count = min(total, POSITIONS)
        rows = ((torch.arange(count) + 0.5) * total / count).long()
    if rows.dim() != 1 or not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= total:
        raise ValueError(f"counted rows of a sample must be 0 to {total - 1}, one at least")
    rows = rows.to(device)
    targets = sample.targets
    if targets is None:
        targets = known_targets(logits, args)[rows]
    answers = torch.arange(len(rows)) if sample.answers is None else sample.answers
    if not len(targets) == len(answers) == len(rows):
        raise ValueError(
            f"a sample has {len(rows)} counted rows, {len(targets)} targets and {len(answers)} "
            "answers; give as many of each"
        )
    return Wanted(rows, targets.to(device), answers.to(device), int(answers.max()) + 1)


def known_targets(logits: Tensor, args: Sequence[Any]) -> Tensor:
    """The token after each row, −1 for all if the inputs do not hold the tokens."""
    try:
        return next_tokens(logits, args)
    except ValueError:
        return torch.full((logits.flatten(0, -2).shape[0],), -1, device=logits.device)
