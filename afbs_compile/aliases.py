"""Which policies belong to a module? A compiled graph knows its own weights, a module all of them.

A policy is kept under the key of the weights that a graph uses. Outside a compiled graph nobody
knows which those are before the module was traced once; after that `<cache>/aliases` tells, by a
key of all weights of the module. A file that cannot be used is a miss: the module is traced again.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from afbs_compile import cache, strict_json
from afbs_compile.identity import model_key
from afbs_compile.logs import warn
from afbs_compile.options import default_cache_dir
from afbs_compile.policy import KEY

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Aliases:
    """The keys of the graphs that a module was traced into."""

    models: tuple[str, ...]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check the schema and that every key can name a file."""
        if self.schema != SCHEMA or not all(map(KEY.fullmatch, self.models)):
            raise ValueError(f"schema {self.schema} with models {self.models}")


def module_key(module: nn.Module) -> str:
    """The key of all parameters and buffers of a module."""
    return model_key([*module.named_parameters(), *module.named_buffers()], "module")


def path_of(key: str, cache_dir: Path | None = None) -> Path:
    """The file of the module `key`."""
    return (cache_dir or default_cache_dir()) / "aliases" / f"{key}.json"


def load(key: str, cache_dir: Path | None = None) -> tuple[str, ...] | None:
    """The model keys of a module, or None if it was never traced."""
    path = path_of(key, cache_dir)
    try:
        text = path.read_text(encoding="utf-8")
        return strict_json.decode(Aliases, strict_json.loads(text)).models
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be used: {error}. The model is traced again.")
        return None


def store(key: str, models: Collection[str], cache_dir: Path | None = None) -> None:
    """Keep the model keys of a module, with those that were known; warns if that cannot be."""
    path = path_of(key, cache_dir)
    known = tuple(sorted({*models, *(load(key, cache_dir) or ())}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.replace_file(path, strict_json.dumps(Aliases(known)))
    except OSError as error:
        warn(f"{path} cannot be written ({error}), so the next process traces the model again")
