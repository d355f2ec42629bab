"""What has an unfinished tuning measured? One file a job under `<cache>/work`, always whole.

A folder belongs to a model, its graph, a length bucket, options, a device and versions; what
another tuning measured lies in another folder. A job names its site and a digest of its input. A
file is a SHA-256 and the NumPy archive that it is of, so that a damaged one is always noticed; it
warns and is a miss. No pickles. Processes that tune the same thing share the folder by leases.
"""

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from afbs_compile import cache, leases
from afbs_compile.identity import model_key
from afbs_compile.leases import COMPLETE, Leases
from afbs_compile.logs import warn

FORMAT = 1
SUFFIX = ".job"
DIGEST_BYTES = 32
ABOUT = "about"  # the archive's member that is JSON
NAME_LETTERS = 60

About = dict[str, Any]
Arrays = dict[str, np.ndarray]


def encode(about: About, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A file's content: JSON values and arrays, with their digest in front."""
    archive = io.BytesIO()
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
    np.savez(archive, allow_pickle=False, **{ABOUT: text}, **arrays)
    return hashlib.sha256(archive.getvalue()).digest() + archive.getvalue()


def decode(content: bytes) -> tuple[About, Arrays]:
    """What `encode` was given.

    Raises:
        ValueError: The content is damaged.
    """
    archive = content[DIGEST_BYTES:]
    if hashlib.sha256(archive).digest() != content[:DIGEST_BYTES]:
        raise ValueError("its digest is that of another content")
    with np.load(io.BytesIO(archive), allow_pickle=False) as members:
        arrays = {name: members[name] for name in members.files}
    return json.loads(arrays.pop(ABOUT).tobytes()), arrays


def to_arrays(value: Any) -> tuple[About, Arrays]:
    """A dataclass of arrays, dicts of arrays and JSON values as `encode` takes it."""
    about: About = {}
    arrays: Arrays = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if isinstance(content, dict):
            about[field.name] = None
            arrays |= {f"{field.name}/{name}": array for name, array in content.items()}
        elif isinstance(content, np.ndarray):
            arrays[field.name] = content
        else:
            about[field.name] = content
    return about, arrays


def from_arrays(about: About, arrays: Arrays) -> dict[str, Any]:
    """The fields of the dataclass that `to_arrays` took."""
    fields = dict(about)
    for name, array in arrays.items():
        field, slash, member = name.partition("/")
        if slash:
            fields[field] = (fields[field] or {}) | {member: array}
        else:
            fields[field] = array
    return fields


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def job_name(about: About) -> str:
    """A file name that is readable and tells jobs apart by all that is said of them."""
    label = "-".join(re.sub(r"\W+", "_", str(value)) for value in list(about.values())[:2])
    return f"{label[:NAME_LETTERS]}-{digest(about)}"


def input_digest(values: Sequence[Any]) -> str:
    """What a call brings besides weights: content of tensors, values of numbers."""
    named = [(str(n), x) for n, x in enumerate(values) if isinstance(x, torch.Tensor)]
    data = [(name, x) for name, x in named if not isinstance(x, torch.nn.Parameter)]
    others = [(n, repr(x)) for n, x in enumerate(values) if not isinstance(x, torch.Tensor)]
    try:
        return model_key(data, json.dumps([len(values), *others]))
    except TypeError as error:
        warn(f"an interrupted tuning on this input cannot be resumed: {error}")
        return uuid.uuid4().hex


class Store:
    """The measurements of one tuning; a context from the first look to the stored policy.

    In a cache that cannot be written it keeps them in a folder of its own, and says so.
    """

    def __init__(
        self, key: str, slot: About, circumstances: About, cache_dir: Path | None = None
    ) -> None:
        """The store of a tuning.

        Args:
            key: The model's key.
            slot: What the policy files a tuning under: bucket and options.
            circumstances: Everything else that measurements depend on: graph, device, versions.
            cache_dir: As in `Options`.
        """
        self.siblings = f"{key}-{digest(slot)}-*"
        name = f"{key}-{digest(slot)}-{digest([FORMAT, circumstances])}"
        self.folder = cache.work_folder(cache_dir) / name
        self.leases = Leases(self.folder, leases.TIMEOUT_S)
        self.left = ExitStack()
        self.lasting = True  # others find it, and so does a later start

    def __enter__(self) -> Self:
        """Join whoever works on the same tuning."""
        try:
            self.left.enter_context(self.leases)
        except OSError as error:
            self.alone(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave; measurements stay unless the tuning is complete."""
        self.left.close()

    def alone(self, error: OSError) -> None:
        """Go on in a temporary folder."""
        warn(
            f"an unfinished tuning cannot be kept in {self.folder.parent} ({error}), so it begins "
            "again if it is interrupted; set AFBS_CACHE_DIR or the option 'cache_dir'"
        )
        self.lasting = False
        parent = Path(tempfile.mkdtemp(prefix="afbs-"))
        self.left.callback(shutil.rmtree, parent, ignore_errors=True)
        self.folder = parent / self.folder.name
        self.leases = self.left.enter_context(Leases(self.folder, leases.TIMEOUT_S))

    def has(self, about: About) -> bool:
        """Is there a file of this job?"""
        return self.path(about).is_file()

    def load(self, about: About) -> tuple[About, Arrays] | None:
        """What a job measured, or None; a damaged file warns and is a miss."""
        path = self.path(about)
        try:
            found, arrays = decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warn(f"{path} cannot be used: {error}. It is measured again.")
            return None
        return found["values"], arrays

    def save(self, about: About, values: About, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what a job measured; warns if that cannot be."""
        content = encode({"job": about, "values": values}, arrays)
        try:
            cache.replace_file(self.path(about), content)
        except OSError as error:
            warn(
                f"{self.path(about)} cannot be written ({error}), so it is measured again if the "
                "tuning is interrupted"
            )

    def claim(self, about: About) -> bool:
        """May we do this job? Release it if so. A folder that is gone is nobody else's."""
        try:
            return self.leases.claim(job_name(about))
        except OSError:
            return True

    def release(self, about: About) -> None:
        """Give a job back."""
        try:
            self.leases.release(job_name(about))
        except OSError:
            return  # the lease grows stale

    def once(self, about: About, measure: Callable[[], tuple[About, Arrays]]) -> Any:
        """What a job measured, by anyone; None if somebody is at it."""
        if (known := self.load(about)) is not None:
            return known
        if not self.claim(about):
            return None
        try:
            if (known := self.load(about)) is not None:  # done between look and claim
                return known
            values, arrays = measure()
            self.save(about, values, arrays)
            return values, arrays
        finally:
            self.release(about)

    def finish(self, *, sweep: bool) -> None:
        """The policy is stored: when the last worker leaves, the measurements go.

        Args:
            sweep: Whether what other graphs and versions left of the tuning goes, too.
        """
        try:
            (self.folder / COMPLETE).touch()
        except OSError:
            return  # the folder is gone
        if sweep:
            self.leases.sweep(self.siblings)

    def path(self, about: About) -> Path:
        """The file of a job."""
        return self.folder / f"{job_name(about)}{SUFFIX}"
