"""On which calls is a model made hybrid? Windows of text, and questions about what they hold.

Plain text hardly shows which heads look far, so needles, copies and people stand beside it
(`quiz`). Documents of a task form calls of equal size. All ask for equally many predictions, by
`logits_to_keep`, so that the model is captured once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile import quiz
from afbs_compile.demo.model import LanguageModel
from afbs_compile.hybrid_samples import Sample
from afbs_compile.quiz import QUIZZES, Quiz

PREDICTIONS = 192  # of every document; questions and answers take no more
TOGETHER = 12288  # tokens of a call, or one document: memory that gradients need grows with them
TEXT = "text"


def samples(
    model: LanguageModel, windows: Sequence[Tensor], tasks: Sequence[str], window: int, seed: int
) -> list[Sample]:
    """Calls for every task, in all of as many documents as there are windows of text.

    Args:
        model: Makes tokens.
        windows: Windows of text [L], read as text and used as filler.
        tasks: Of `quiz.QUIZZES`, and `text`.
        window: Keys of a windowed head: only later predictions of text count.
        seed: Of the questions.

    Raises:
        ValueError: No such task.
        CommandError: A question does not fit into a window.
    """
    if unknown := [task for task in tasks if task not in (*QUIZZES, TEXT)]:
        raise ValueError(f"no task {', '.join(unknown)}; there are {', '.join((*QUIZZES, TEXT))}")
    asked: dict[str, Sequence[Any]] = {
        task: windows if task == TEXT else quizzes(model, task, windows, seed) for task in tasks
    }
    return [
        reading(model, part, window) if task == TEXT else posed(model, task, part)
        for task, documents in asked.items()
        for part in parts(documents, len(windows[0]))
    ]


def quizzes(model: LanguageModel, task: str, windows: Sequence[Tensor], seed: int) -> list[Quiz]:
    """A document with questions for each window of filler, at depths in turn."""
    return [
        quiz.quiz(task, model.tokens, filler, quiz.depth_of(n + seed), seed + n, PREDICTIONS)
        for n, filler in enumerate(windows)
    ]


def parts(documents: Sequence[Any], tokens: int) -> list[Sequence[Any]]:
    """Equally many documents a call, as many as make at most `TOGETHER` tokens, one at least."""
    count = len(documents)
    each = max(
        n for n in range(1, count + 1) if not count % n and n * tokens <= max(tokens, TOGETHER)
    )
    return [documents[n : n + each] for n in range(0, count, each)]


def predictions(length: int) -> int:
    """How many a document of so many tokens is asked for."""
    return min(PREDICTIONS, length - 1)


def reading(model: LanguageModel, windows: Sequence[Tensor], window: int) -> Sample:
    """Text, of which predictions beyond the window count, evenly."""
    ids = torch.stack(list(windows))
    length = ids.shape[1]
    first = min(window, length - 2)
    count = predictions(length)
    step = (torch.arange(count) + 0.5) * (length - 1 - first) / count
    places = first + step.long()
    rows = torch.arange(ids.shape[0] * count)
    return Sample(call(model, ids, places), TEXT, rows, ids[:, places + 1].flatten(), rows)


def posed(model: LanguageModel, task: str, asked: Sequence[Quiz]) -> Sample:
    """Documents with questions as a call, of which the answers count."""
    ids = torch.stack([one.ids for one in asked])
    count = predictions(ids.shape[1])
    first = ids.shape[1] - 1 - count
    counted, targets, answers, before = [], [], [], 0
    for n, one in enumerate(asked):
        counted.append(n * count + one.places - 1 - first)
        targets.append(one.ids[one.places])
        answers.append(before + one.questions)
        before += int(one.questions.max()) + 1
    places = torch.arange(first, first + count)
    return Sample(
        call(model, ids, places), task, torch.cat(counted), torch.cat(targets), torch.cat(answers)
    )


def call(model: LanguageModel, ids: Tensor, places: Tensor) -> dict[str, Any]:
    """The model's arguments for documents [B, L] and places whose predictions are asked for."""
    device = model.device
    return {
        "input_ids": ids.to(device),
        "logits_to_keep": places.to(device),
        "use_cache": False,
    }
