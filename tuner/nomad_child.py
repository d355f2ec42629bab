"""NOMAD (LGPL) in a process of its own: asks for losses on stdout, hears them on stdin.

Started by `nomad`, one JSON object a line. First it hears `{"start": [0, 1, …], "seed": 0,
"evaluations": 100}`. It asks `{"bits": [0, 1, …]}` and hears `{"loss": 0.5}`, null for a choice
that has none, until it says `{"done": "why"}`. Nothing of ours is imported here.
"""

import importlib
import json
import os
import sys
from typing import Any, TextIO

CIRCLING = 30  # questions for an evaluation, most of them asked before, after which NOMAD ends
# Quadratic models on binary variables take NOMAD 4.6 minutes a step: none are made.
PARAMETERS = (
    "BB_INPUT_TYPE * B", "BB_OUTPUT_TYPE OBJ", "DISPLAY_DEGREE 0", "QUAD_MODEL_SEARCH no",
    "NM_SEARCH no", "DIRECTION_TYPE ORTHO 2N", "EVAL_QUEUE_SORT DIR_LAST_SUCCESS",
)  # fmt: skip


def main() -> None:
    """Search until the evaluations are spent or NOMAD knows nothing new."""
    answers = sys.stdin
    with os.fdopen(os.dup(1), "w") as questions:
        os.dup2(2, 1)  # the library prints as it likes
        solve(json.loads(answers.readline()), questions, answers)


def solve(wanted: dict[str, Any], questions: TextIO, answers: TextIO) -> None:
    """Run NOMAD on the bits."""
    size, evaluations = len(wanted["start"]), int(wanted["evaluations"])

    def evaluate(point: Any) -> int:
        bits = [int(point.get_coord(n) > 0.5) for n in range(size)]
        say(questions, {"bits": bits})
        loss = json.loads(answers.readline())["loss"]
        if loss is None:
            return 0
        point.setBBO(repr(loss).encode())
        return 1

    found = importlib.import_module("PyNomad").optimize(
        evaluate, [float(bit) for bit in wanted["start"]], [0.0] * size, [1.0] * size,
        [f"DIMENSION {size}", f"MAX_BB_EVAL {evaluations}", f"SEED {wanted['seed']}",
         f"MAX_EVAL {CIRCLING * evaluations}", *PARAMETERS],
    )  # fmt: skip
    say(questions, {"done": str(found.get("stop_reason", ""))})


def say(questions: TextIO, told: dict[str, Any]) -> None:
    """Write one line."""
    questions.write(json.dumps(told) + "\n")
    questions.flush()


if __name__ == "__main__":
    main()
