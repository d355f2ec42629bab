"""Who works on which job? Leases in a shared folder that a dead worker cannot keep.

A worker claims a job by creating `<job>.lease` with O_EXCL and touches it from a thread while it
works; a lease that nobody touched for `timeout_s` may be stolen. Ages are differences of times
that the file system gave, so clocks of machines need not agree. A worker that was only slow, and
whose lease was stolen, does no harm: results are files that are replaced whole, and equal.
"""

import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

TIMEOUT_S = 30.0  # many times the longest pause of a thread that touches files
BEATS = 6  # touches within the timeout
LOCK_SECONDS = 20.0  # the lock is held for milliseconds
LEASE, PRESENCE, COMPLETE = ".lease", ".worker", "complete"


class Leases:
    """One worker's part in the work of a folder; a context from joining to leaving.

    Whoever leaves a folder that is marked complete as the last one alive deletes it.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        """Prepare to work in `folder`; nothing is written before the context is entered."""
        self.folder, self.timeout_s = folder, timeout_s
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.presence = folder / f"{self.owner}{PRESENCE}"
        self.touched = {self.presence}
        self.stopped = threading.Event()
        self.heart = threading.Thread(target=self.beat, name="afbs-leases", daemon=True)

    def __enter__(self) -> Self:
        """Join.

        Raises:
            OSError: The folder cannot be written (TimeoutError: its lock is held).
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.guard():
            self.folder.mkdir(exist_ok=True)
            self.presence.touch()
            if (self.folder / COMPLETE).exists() and not self.others(self.folder):
                self.empty()  # whoever finished it died before it could be deleted
        self.heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave; a folder that is complete and empty of workers goes."""
        self.stopped.set()
        self.heart.join()
        try:
            with self.guard():
                if (self.folder / COMPLETE).exists():
                    self.delete_unused(self.folder)
                for path in self.touched:
                    path.unlink(missing_ok=True)
        except OSError:
            return  # what stays behind is stale after `timeout_s`, and is swept by a later tuning

    @contextmanager
    def guard(self) -> Iterator[None]:
        """The lock of all work folders of a cache: held to join, steal, release and leave."""
        try:
            with FileLock(self.folder.parent / ".lock", timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise TimeoutError(str(error)) from error

    def beat(self) -> None:
        """Touch what is ours until it is enough."""
        while not self.stopped.wait(self.timeout_s / BEATS):
            for path in list(self.touched):
                touch(path)

    def claim(self, job: str) -> bool:
        """Take a job that is free, or whose worker is dead; False if somebody is at it.

        Raises:
            OSError: The folder cannot be written.
        """
        path = self.folder / f"{job}{LEASE}"
        if not self.create(path):
            if self.alive(path):
                return False
            with self.guard():
                if self.alive(path):  # another thief was faster
                    return False
                path.unlink(missing_ok=True)
                if not self.create(path):
                    return False
        self.touched.add(path)
        return True

    def create(self, path: Path) -> bool:
        """Create a lease with our name in it; False if there is one."""
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.owner)
        except FileExistsError:
            return False
        return True

    def release(self, job: str) -> None:
        """Give a job back, unless it was stolen.

        Raises:
            OSError: The lock cannot be had.
        """
        path = self.folder / f"{job}{LEASE}"
        self.touched.discard(path)
        with self.guard():
            if path.exists() and path.read_text(encoding="utf-8") == self.owner:
                path.unlink()

    def alive(self, path: Path) -> bool:
        """Was a lease or presence touched within the timeout? Not if there is none."""
        touch(self.presence)
        try:
            now = self.presence.stat().st_mtime
            return now - path.stat().st_mtime < self.timeout_s
        except FileNotFoundError:
            return False

    def others(self, folder: Path) -> bool:
        """Does anybody else who is alive work in a folder?"""
        theirs = [path for path in folder.glob(f"*{PRESENCE}") if path != self.presence]
        return any(self.alive(path) for path in theirs)

    def empty(self) -> None:
        """Delete everything in our folder but our presence; the lock is held."""
        for path in self.folder.iterdir():
            if path != self.presence:
                path.unlink()

    def delete_unused(self, folder: Path) -> None:
        """Delete a work folder unless somebody works in it; the lock is held."""
        if not self.others(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, pattern: str) -> None:
        """Delete the other work folders that `pattern` names, or that are complete, if unused."""
        try:
            with self.guard():
                done = {path.parent for path in self.folder.parent.glob(f"*/{COMPLETE}")}
                for folder in {*self.folder.parent.glob(pattern), *done} - {self.folder}:
                    self.delete_unused(folder)
        except OSError:
            return  # the next one sweeps


def touch(path: Path) -> None:
    """Set the time of a file, if it is still there."""
    try:
        os.utime(path)
    except OSError:
        return  # deleted, or out of reach for a moment: the lease then counts as dead
