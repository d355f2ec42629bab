"""On which calls is a model made hybrid? Windows of text, and questions about what they hold.

Plain text hardly shows which heads look far, so needles, keys and copies stand beside it
(`recall`). Documents of a task form one call. All calls ask for equally many predictions, by
`logits_to_keep`, so that the model is captured once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile import recall
from afbs_compile.demo.model import LanguageModel
from afbs_compile.hybrid_samples import Sample
from afbs_compile.recall import TASKS, Problem

PREDICTIONS = 64  # of every document; no answer is longer
TEXT = "text"


def samples(
    model: LanguageModel, windows: Sequence[Tensor], tasks: Sequence[str], window: int, seed: int
) -> list[Sample]:
    """A call for every task, of as many documents as there are windows of text.

    Args:
        model: Makes tokens.
        windows: Windows of text [L], read as text and used as filler.
        tasks: Of `recall.TASKS`, and `text`.
        window: Keys of a windowed head: only later predictions of text count.
        seed: Of the questions.

    Raises:
        ValueError: No such task.
        CommandError: A question does not fit into a window.
    """
    if unknown := [task for task in tasks if task not in (*TASKS, TEXT)]:
        raise ValueError(f"no task {', '.join(unknown)}; there are {', '.join((*TASKS, TEXT))}")
    return [
        reading(model, windows, window) if task == TEXT else
        asking(model, task, windows, seed)
        for task in tasks
    ]  # fmt: skip


def reading(model: LanguageModel, windows: Sequence[Tensor], window: int) -> Sample:
    """Text, of which predictions beyond the window count, evenly."""
    ids = torch.stack(list(windows))
    length = ids.shape[1]
    first = min(window, length - 2)
    step = (torch.arange(PREDICTIONS) + 0.5) * (length - 1 - first) / PREDICTIONS
    places = first + step.long()
    rows = torch.arange(ids.shape[0] * PREDICTIONS)
    return Sample(call(model, ids, places), TEXT, rows, ids[:, places + 1].flatten(), rows)


def asking(model: LanguageModel, task: str, windows: Sequence[Tensor], seed: int) -> Sample:
    """A question in each window, at depths in turn."""
    problems = [
        TASKS[task](model.tokens, filler, depth_of(n, seed), seed + n)
        for n, filler in enumerate(windows)
    ]
    return posed(model, task, problems)


def posed(model: LanguageModel, task: str, problems: Sequence[Problem]) -> Sample:
    """Questions of one task as a call, of which the answers count."""
    ids = torch.stack([problem.ids for problem in problems])
    length = ids.shape[1]
    places = torch.arange(length - 1 - PREDICTIONS, length - 1)
    counted = [
        n * PREDICTIONS + torch.arange(PREDICTIONS - problem.answer, PREDICTIONS)
        for n, problem in enumerate(problems)
    ]
    targets = [problem.ids[length - problem.answer :] for problem in problems]
    answers = [torch.full((problem.answer,), n) for n, problem in enumerate(problems)]
    return Sample(
        call(model, ids, places), task, torch.cat(counted), torch.cat(targets), torch.cat(answers)
    )


def depth_of(n: int, seed: int) -> float:
    """The depth of the n-th question."""
    return recall.DEPTHS[(n + seed) % len(recall.DEPTHS)]


def call(model: LanguageModel, ids: Tensor, places: Tensor) -> dict[str, Any]:
    """The model's arguments for documents [B, L] and places whose predictions are asked for."""
    device = model.device
    return {
        "input_ids": ids.to(device),
        "logits_to_keep": places.to(device),
        "use_cache": False,
    }
