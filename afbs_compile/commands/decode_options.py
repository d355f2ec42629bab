"""What can `afbs bench decode` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

CASES = "8x32768,4x131072,8x131072"
VARIANTS = ("hybrid", "ratio0", "whole", "static")


def add_decode_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench decode` and `bench/decode.py` share."""
    command.add_argument(
        "--model", default="llama-3-8b", metavar="NAME", help="shapes: llama-3-8b or tiny"
    )
    command.add_argument(
        "--cases", default=CASES, metavar="BxT", help=f"batch x tokens, with commas: {CASES}"
    )
    command.add_argument(
        "--ratios", default="0.75", metavar="R", help="shares of windowed KV heads, with commas"
    )
    command.add_argument("--window", type=int, default=1024, metavar="N", help="tokens")
    command.add_argument("--sink", type=int, default=4, metavar="N", help="tokens")
    command.add_argument(
        "--variants", default=",".join(VARIANTS), metavar="NAMES",
        help=f"with commas: {', '.join(VARIANTS)}",
    )  # fmt: skip
    command.add_argument(
        "--case", choices=("decode", "op", "prompt"), default="decode",
        help="the whole model; or one layer's attention alone, of a token or of a prompt",
    )  # fmt: skip
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="write decode.json there")
