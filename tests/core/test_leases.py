"""Leases: one owner at a time, a dead one's are stolen, a live one's are not."""

import os
import threading
import time

import pytest

from afbs_compile.leases import Leases

TIMEOUT_S = 1.2


@pytest.fixture
def workers(tmp_path):
    """Makes workers in one folder; all leave at the end."""
    inside = []

    def join(timeout_s=TIMEOUT_S):
        inside.append(Leases(tmp_path / "work" / "folder", timeout_s).__enter__())
        return inside[-1]

    yield join
    for worker in inside:
        worker.__exit__(None, None, None)


def die(worker):
    """Stop beating, as if killed."""
    worker.stopped.set()
    worker.heart.join()


def make_old(worker, job, seconds):
    path = worker.folder / f"{job}.lease"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_one_owner_at_a_time(workers):
    one, other = workers(), workers()
    assert one.claim("a")
    assert not other.claim("a")
    assert not one.claim("a")
    assert other.claim("b")
    one.release("a")
    assert other.claim("a")


def test_a_live_owner_keeps_its_lease_past_the_timeout(workers):
    one, other = workers(), workers()
    assert one.claim("a")
    time.sleep(1.5 * TIMEOUT_S)
    assert not other.claim("a")


def test_a_dead_owner_loses_its_lease(workers):
    one, other = workers(), workers()
    assert one.claim("a")
    die(one)
    assert not other.claim("a")
    make_old(one, "a", 2 * TIMEOUT_S)
    assert other.claim("a")


def test_a_lease_that_was_stolen_is_not_given_back(workers):
    one, other, third = workers(), workers(), workers()
    assert one.claim("a")
    make_old(one, "a", 2 * TIMEOUT_S)
    assert other.claim("a")
    one.release("a")
    assert not third.claim("a")


def test_many_thieves_one_gets_it(workers):
    dead = workers(60.0)
    assert dead.claim("a")
    make_old(dead, "a", 120)
    thieves = [workers(60.0) for _ in range(8)]
    start, got = threading.Barrier(len(thieves)), []

    def steal(thief):
        start.wait()
        if thief.claim("a"):
            got.append(thief)

    threads = [threading.Thread(target=steal, args=(thief,)) for thief in thieves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_leaving_gives_everything_back(workers, tmp_path):
    with Leases(tmp_path / "work" / "folder", TIMEOUT_S) as gone:
        assert gone.claim("a")
    assert workers().claim("a")
    assert not gone.heart.is_alive()


def test_what_was_completed_by_a_dead_worker_is_not_taken_up(workers):
    dead = workers()
    (dead.folder / "job").touch()
    (dead.folder / "complete").touch()
    die(dead)
    then = time.time() - 2 * TIMEOUT_S
    os.utime(dead.presence, (then, then))
    fresh = workers()
    assert [path.name for path in fresh.folder.iterdir()] == [fresh.presence.name]
