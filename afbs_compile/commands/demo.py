"""`afbs demo`: a real language model made sparse, measured honestly."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from afbs_compile.commands.output import emit_json, emit_text
from afbs_compile.commands.picture import write_heatmap
from afbs_compile.commands.wishes import wishes

HEATMAP = Path("afbs-demo.png")


def run(args: Namespace) -> int:
    """Run the demo and print what came out; the picture comes last, so it can spoil nothing."""
    given = wishes(args)
    from afbs_compile.demo import render
    from afbs_compile.demo.run import Setup, demo

    result, tuning = demo(Setup(args.model, args.text, args.tokens, given))
    if args.json:
        emit_json(asdict(result))
    else:
        render.show(result, tuning)
    picture = args.heatmap or (None if args.json else HEATMAP)
    if picture and tuning:
        write_heatmap(tuning, picture, f"density at {tuning.length} tokens")
        if not args.json:
            emit_text(f"Heat map: {picture}")
    return 0
