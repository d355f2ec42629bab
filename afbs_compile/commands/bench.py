"""`afbs bench`: what the kernels do on this machine, and what sparsity costs a language model."""

from argparse import Namespace

from afbs_compile.commands.output import emit_json, emit_text


def run(args: Namespace) -> int:
    """Measure, and print tables or the whole result."""
    return {"attention": attention, "quality": quality, "retrieval": retrieval}[args.what](args)


def attention(args: Namespace) -> int:
    """The kernels against their rivals, as the README's table."""
    from afbs_compile.bench import attention, tables

    document = attention.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(tables.attention(document))
    return 0


def quality(args: Namespace) -> int:
    """Perplexity and KL by setting."""
    from afbs_compile.bench import quality, quality_show

    document = quality.run(args, args.output)
    if args.plot:
        quality_show.draw(document, args.plot)
    if args.json:
        emit_json(document)
    else:
        quality_show.show(document)
    return 0


def retrieval(args: Namespace) -> int:
    """What is still found, by setting."""
    from afbs_compile.bench import retrieval

    document = retrieval.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        retrieval.show(document)
    return 0
