"""`afbs tune`: tune a local model ahead of time."""

from argparse import Namespace
from pathlib import Path

from afbs_compile import cache
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import emit_json
from afbs_compile.commands.show import print_tuning
from afbs_compile.commands.wishes import wishes
from afbs_compile.policy import Policy
from afbs_compile.summary import summary

WINDOWS = 2  # where the text is long enough: the second validates what the first found


def run(args: Namespace) -> int:
    """Tune on a text; the policy goes to the cache, and to a file if asked."""
    given = wishes(args)
    import afbs_compile
    from afbs_compile.demo import model, text

    language_model = model.from_folder(args.model)
    tokens = language_model.tokens(text.read(args.text))
    count = WINDOWS if tokens.numel() >= WINDOWS * args.tokens else 1
    inputs = [language_model.inputs(w) for w in text.windows(tokens, args.tokens, count)]
    try:
        policy = afbs_compile.tune(language_model.module, inputs, **given)
    except ValueError as error:
        raise CommandError(f"{language_model.name} cannot be tuned: {error}") from error
    if args.out:
        write(policy, args.out)
    if args.json:
        path = str(args.out or cache.path_of(policy.model, args.cache_dir))
        emit_json(summary(policy) | {"policy_path": path})
    else:
        for tuning in summary(policy)["tunings"]:
            print_tuning(policy, tuning)
    return 0


def write(policy: Policy, path: Path) -> None:
    """Write the policy to a file that the user named."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.replace_file(path, policy.to_json())
    except OSError as error:
        raise CommandError(f"the policy cannot be written to {path}: {error}") from error
