"""`afbs demo`: a real language model made sparse, measured honestly."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from afbs_compile.commands.output import emit_json
from afbs_compile.commands.wishes import wishes

HEATMAP = Path("afbs-demo.png")


def run(args: Namespace) -> int:
    """Run the demo and print what came out."""
    given = wishes(args)
    from afbs_compile.demo import render
    from afbs_compile.demo.run import Setup, demo

    setup = Setup(args.model, args.text, args.tokens, given)
    result, tuning = demo(setup)
    picture = render.heatmap(tuning, args.heatmap or HEATMAP) if tuning else None
    if args.json:
        emit_json(asdict(result))
    else:
        render.show(result, tuning, picture)
    return 0
