"""Where are policies kept? One JSON file a model under `<cache>/policies`, always whole.

A writer holds `<key>.json.lock`, takes in what others wrote meanwhile, writes a temporary file
beside the old one and renames it over: a reader, or a crash, sees the old file or the new one. A
file that cannot be used is a miss, is said so once, and is put aside rather than overwritten.
Deleting the folder is always safe.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from afbs_compile.logs import warn
from afbs_compile.options import default_cache_dir
from afbs_compile.policy import KEY, Policy, PolicyError

LOCK_SECONDS = 20.0  # a writer holds the lock for milliseconds
SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache; `policy` is None where `problem` says why it cannot be used."""

    key: str
    path: Path
    size_bytes: int
    policy: Policy | None
    problem: str | None


def folder(cache_dir: Path | None = None) -> Path:
    """Where the policy files are."""
    return (cache_dir or default_cache_dir()) / "policies"


def work_folder(cache_dir: Path | None = None) -> Path:
    """Where unfinished tunings are, in folders whose names begin with the model's key."""
    return (cache_dir or default_cache_dir()) / "work"


def path_of(key: str, cache_dir: Path | None = None) -> Path:
    """The file of the model `key`; ValueError if no key looks like that."""
    if not KEY.fullmatch(key):
        raise ValueError(f"model key is {key!r}; needed: 1-64 of A-Z a-z 0-9 _ -")
    return folder(cache_dir) / f"{key}{SUFFIX}"


def load(key: str, cache_dir: Path | None = None) -> Policy | None:
    """The stored policy of the model `key`; a file that cannot be used warns and is a miss."""
    path = path_of(key, cache_dir)
    try:
        return read(path)
    except PolicyError as error:
        warn(f"{error}. The model is tuned again.")
        return None


def read(path: Path) -> Policy | None:
    """The policy in a cache file, or None if there is no file.

    Raises:
        PolicyError: The file is damaged, of a newer version, or of another model.
    """
    try:
        present = path.is_file()
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error}") from error
    if not present:
        return None
    policy = Policy.read(path)
    if policy.model != path.stem:
        raise PolicyError(f"{path} holds the policy of another model, {policy.model}; delete it")
    return policy


def store(policy: Policy, cache_dir: Path | None = None) -> Path | None:
    """Write `policy`, keeping the tunings that others stored; None after a warning if not."""
    path = path_of(policy.model, cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            replace_file(path, merged(policy, path).to_json())
    except (OSError, Timeout) as error:
        warn(
            f"the policy could not be kept in {path.parent} ({error}), so the next process tunes "
            "again; make the folder writable, or set AFBS_CACHE_DIR or the option 'cache_dir'"
        )
        return None
    return path


def merged(policy: Policy, path: Path) -> Policy:
    """`policy` with the tunings of the file that it lacks; an unusable file is put aside."""
    try:
        stored = read(path)
    except PolicyError:
        path.replace(path.with_name(f"{path.name}.unusable"))
        return policy
    if stored is None:
        return policy
    together = Policy(stored.model, policy.model_name or stored.model_name, stored.tunings)
    for tuning in policy.tunings:
        together = together.with_tuning(tuning)
    return together


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`; a reader sees the old file or the new one, never a part."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def entries(cache_dir: Path | None = None) -> list[Entry]:
    """Every policy file, usable or not, by key."""
    return [entry_of(path) for path in sorted(folder(cache_dir).glob(f"*{SUFFIX}"))]


def entry_of(path: Path) -> Entry:
    """What there is to say of one policy file."""
    problem: str | None = None
    policy: Policy | None = None
    try:
        policy = read(path)
    except PolicyError as error:
        problem = str(error)
    return Entry(path.stem, path, path.stat().st_size, policy, problem)


def remove(key: str, cache_dir: Path | None = None) -> list[Path]:
    """Delete all that is kept of the model `key` but its lock; the files that went.

    Raises:
        OSError: A file cannot be deleted.
        ValueError: `key` can be no model's key.
    """
    path = path_of(key, cache_dir)
    gone = [file for file in sorted(path.parent.glob(f"{path.name}*")) if file.suffix != ".lock"]
    for file in gone:
        file.unlink()
    unfinished = sorted(work_folder(cache_dir).glob(f"{key}-*"))
    for work in unfinished:
        shutil.rmtree(work)
    return [*gone, *unfinished]


def clear(cache_dir: Path | None = None) -> list[Path]:
    """Delete what is kept of every model; the files that went.

    Raises:
        OSError: A file cannot be deleted.
    """
    keys = {path.name.partition(SUFFIX)[0] for path in folder(cache_dir).glob(f"*{SUFFIX}*")}
    keys |= {path.name.split("-")[0] for path in work_folder(cache_dir).glob("*-*")}
    return [file for key in sorted(keys) for file in remove(key, cache_dir)]
