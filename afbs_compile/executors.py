"""Who else works? Helpers in other processes, for as long as a context is open.

A helper profiles sites that nobody else does; the process that asked works too, waits for what is
missing, and searches. So nothing depends on a helper: one that dies is a warning.
"""

import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch

from afbs_compile import options
from afbs_compile.logs import warn

Work = Callable[[int], None]
"""What the n-th helper does, n ≥ 1; it must be possible to pickle it."""

GRACE_S = 20.0  # for a helper to leave once it was asked to
BARRIER_S = 1800.0  # for the slowest rank to load the model
RAY_RETRIES = 3
CALLS = itertools.count()  # ranks make the same calls in the same order


def helpers(executor: str | None, workers: int | None, work: Work) -> AbstractContextManager[None]:
    """Helpers at work.

    Args:
        executor: One of `options.EXECUTORS`, or None for no helpers.
        workers: Processes, with the one that asks; None for one a GPU, and two at least.
        work: What a helper does.

    Raises:
        ValueError: The executor is unknown or cannot be had, or `workers` does not fit it.
    """
    if executor not in (None, *options.EXECUTORS):
        known = ", ".join(options.EXECUTORS)
        raise ValueError(f"executor is {executor!r}; give one of {known}, or None")
    if executor in (None, "torchrun"):
        if workers is not None:
            raise ValueError(f"workers is {workers} with executor {executor!r}; it takes none")
        return nullcontext() if executor is None else ranks()
    if workers is None:
        workers = max(2, torch.cuda.device_count())
    if workers < 2:
        raise ValueError(f"workers is {workers}; give at least 2: the one that asks counts")
    return local(work, workers) if executor == "local" else on_ray(work, workers)


@contextmanager
def local(work: Work, workers: int) -> Iterator[None]:
    """Processes of this machine; the cores are shared out among them while they work."""
    context = torch.multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    begin = [context.Process(target=alone, args=(work, n, share)) for n in range(1, workers)]
    for process in begin:
        process.daemon = True
        process.start()
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        dead = [process.exitcode for process in begin if process.exitcode]
        for process in begin:
            dismiss(process)
        if dead:
            warn(f"{len(dead)} tuning helpers died (exit codes {dead}); others did their work")


def dismiss(process: BaseProcess) -> None:
    """End a helper, gently at first."""
    process.terminate()
    process.join(GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()


def alone(work: Work, n: int, threads: int) -> None:
    """A helper's process: leaves properly when it is asked to."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    torch.set_num_threads(threads)
    on_own_device(n)
    try:
        work(n)
    except KeyboardInterrupt:
        sys.exit(0)  # Ctrl-C reaches all processes; the one that asked speaks


@contextmanager
def on_ray(work: Work, workers: int) -> Iterator[None]:
    """Tasks on a Ray cluster: the running one, or a local one that lives as long as they do.

    Helpers on other machines need the same cache folder. Every helper must be able to import the
    model's classes: Dynamo cannot trace those of `__main__`, which Ray sends by value.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            'executor "ray" needs Ray; run `pip install "afbs-compile[ray]"`'
        ) from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)

    def task(n: int) -> None:
        work(n)

    needs = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0}
    remote = ray.remote(max_retries=RAY_RETRIES, **needs)(task)
    running = [remote.remote(n) for n in range(1, workers)]
    try:
        yield
    finally:
        ended, at_work = ray.wait(running, num_returns=len(running), timeout=0)
        for reference in at_work:
            ray.cancel(reference)
        failures = [why for reference in ended if (why := failure(reference))]
        if ours:
            ray.shutdown()
        if failures:
            warn(f"{len(failures)} helpers failed on Ray: {failures[0]}; others did their work")


def failure(reference: Any) -> str | None:
    """What a task that ended died of, or None."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        return str(error)
    return None


@contextmanager
def ranks() -> Iterator[None]:
    """The ranks that torchrun started, all of which asked; none goes on before all are here."""
    rank = options.torchrun_rank()
    if rank is None:
        raise ValueError(
            'executor "torchrun" needs torchrun: `torchrun --no-python … afbs tune …`'
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    else:
        from torch.distributed.rendezvous import rendezvous

        store, _, size = next(rendezvous("env://"))
        call = next(CALLS)
        store.set(f"afbs/{call}/{rank}", "here")
        everyone = [f"afbs/{call}/{n}" for n in range(size)]
        store.wait(everyone, timedelta(seconds=BARRIER_S))
    yield


def on_own_device(n: int) -> None:
    """Make the n-th worker's GPU the current one, if there are GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(n % torch.cuda.device_count())
