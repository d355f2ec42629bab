"""`afbs bench`: what the kernels do on this machine, measured as the README's tables are."""

from argparse import Namespace

from afbs_compile.commands.output import emit_json, emit_text


def run(args: Namespace) -> int:
    """Measure, and print the README's table or the whole result."""
    from afbs_compile.bench import attention, tables

    document = attention.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(tables.attention(document))
    return 0
