"""How does a command write the heat map? Or say why it cannot."""

from pathlib import Path

from afbs_compile.commands.errors import CommandError
from afbs_compile.policy import Tuning


def write_heatmap(tuning: Tuning, path: Path, title: str) -> None:
    """Draw `tuning` into `path`.

    Raises:
        CommandError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from afbs_compile.heatmap import draw
    except ModuleNotFoundError as error:
        raise CommandError(
            f'{error.name} is missing; run `pip install "afbs-compile[demo]"`'
        ) from error
    try:
        draw(tuning, path, title)
    except (OSError, ValueError) as error:
        raise CommandError(f"the heat map {path} cannot be written: {error}") from error
