"""What can `afbs bench prefill` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

MODELS = ("llama-3-8b", "wan-14b", "tiny", "tiny-video")
KEPT = "1,0.25,0.1"


def add_prefill_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench prefill` and `bench/prefill.py` share."""
    command.add_argument(
        "--model", choices=MODELS, default="llama-3-8b", help="shapes, weights are random"
    )
    command.add_argument(
        "--tokens", default="8192,32768,65536,131072", metavar="N",
        help="lengths of the prompt, or of the video, with commas",
    )  # fmt: skip
    command.add_argument(
        "--kept", default=KEPT, metavar="SHARES", help="of the visible blocks, with commas"
    )
    command.add_argument("--layers", type=int, metavar="N", help="fewer than the model has")
    command.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="interleaved runs of every variant"
    )
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin no length after N seconds"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="write prefill.json there")
