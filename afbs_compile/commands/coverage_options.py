"""What can `afbs bench coverage` and `afbs bench fuzz` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path


def add_coverage_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench coverage` and `bench/coverage.py` share."""
    command.add_argument("--models", metavar="NAMES", help="a part, with semicolons")
    command.add_argument("--longest", type=int, metavar="N", help="no cell of more tokens")
    command.add_argument(
        "--starred", action="store_true", help="only the models that are run on a GPU as well"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16 is held to twice what dense bfloat16 loses against float32",
    )  # fmt: skip
    add_running(command)


def add_fuzz_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench fuzz` and `bench/fuzz.py` share."""
    command.add_argument("--count", type=int, default=200, metavar="N", help="models (200)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="the first one's (0)")
    add_running(command)


def add_running(command: argparse.ArgumentParser) -> None:
    """What compiles the graphs, for how long, and where results go."""
    command.add_argument(
        "--inner",
        choices=("interpreted", "eager", "inductor"),
        default="eager",
        help="what is compiled: nothing, kernels (eager), or graphs as well (inductor)",
    )
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="write results there, and continue older ones"
    )
