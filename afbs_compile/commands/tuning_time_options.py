"""What can `afbs bench tuning-time` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path


def add_tuning_time_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench tuning-time` and `bench/tuning_time.py` share."""
    command.add_argument(
        "--model", default="llama-2-7b", metavar="NAME",
        help="llama-2-7b (its shapes, weights of noise), tiny, or smollm2",
    )  # fmt: skip
    command.add_argument(
        "--tokens", default="4096,32768", metavar="N", help="of a document, with commas"
    )
    command.add_argument("--documents", type=int, default=1, metavar="N", help="that are read (1)")
    command.add_argument(
        "--case", default="profile,model", metavar="NAMES",
        help="a part, with commas: profile (one layer), model (a whole tuning)",
    )  # fmt: skip
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="write results there, and continue older ones"
    )
