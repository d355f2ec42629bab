"""`afbs tune`: tune a local model ahead of time."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from afbs_compile import cache
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import emit_json
from afbs_compile.commands.show import print_tuning
from afbs_compile.commands.wishes import wishes
from afbs_compile.options import torchrun_local_rank, torchrun_rank
from afbs_compile.policy import Policy
from afbs_compile.summary import summary

WINDOWS = 2  # where the text is long enough: the second validates what the first found


def run(args: Namespace) -> int:
    """Tune on a text; the policy goes to the cache, and to a file if asked."""
    given = wishes(args)
    import afbs_compile
    from afbs_compile import executors
    from afbs_compile.demo import model, text

    if args.executor == "torchrun":
        executors.on_own_device(torchrun_local_rank())
    language_model = model.from_folder(args.model)
    tokens = language_model.tokens(text.read(args.text))
    count = WINDOWS if tokens.numel() >= WINDOWS * args.tokens else 1
    inputs = [language_model.inputs(w) for w in text.windows(tokens, args.tokens, count)]
    try:
        policy = afbs_compile.tune(language_model.module, inputs, **given, **sharing(args))
    except ValueError as error:
        raise CommandError(f"{language_model.name} cannot be tuned: {error}") from error
    if args.executor == "torchrun" and torchrun_rank():
        return 0  # rank 0 speaks for all
    if args.out:
        write(policy, args.out)
    if args.json:
        path = str(args.out or cache.path_of(policy.model, args.cache_dir))
        emit_json(summary(policy) | {"policy_path": path})
    else:
        for tuning in summary(policy)["tunings"]:
            print_tuning(policy, tuning)
    return 0


def sharing(args: Namespace) -> dict[str, Any]:
    """How the work is shared; helpers load the model themselves.

    Raises:
        CommandError: Workers without an executor.
    """
    if args.executor is None:
        if args.workers is not None:
            raise CommandError("--workers needs --executor local or ray")
        return {}
    loader = partial(module, args.model)
    return {"executor": args.executor, "workers": args.workers, "loader": loader}


def module(folder: Path) -> Any:
    """The model of a helper."""
    from afbs_compile.demo import model

    return model.from_folder(folder).module


def write(policy: Policy, path: Path) -> None:
    """Write the policy to a file that the user named."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.replace_file(path, policy.to_json())
    except OSError as error:
        raise CommandError(f"the policy cannot be written to {path}: {error}") from error
