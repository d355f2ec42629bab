"""`afbs bench`: what the kernels do on this machine, and how good which search strategy is."""

from argparse import Namespace

from afbs_compile.commands.output import emit_json, emit_text


def run(args: Namespace) -> int:
    """Measure, and print tables or the whole result."""
    return {"attention": attention, "tuner": tuner}[args.what](args)


def attention(args: Namespace) -> int:
    """The kernels against their rivals, as the README's table."""
    from afbs_compile.bench import attention, tables

    document = attention.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(tables.attention(document))
    return 0


def tuner(args: Namespace) -> int:
    """Strategies side by side."""
    from afbs_compile.bench import tuner, tuner_show

    document = tuner.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        tuner_show.show(document)
    return 0
