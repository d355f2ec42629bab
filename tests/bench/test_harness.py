"""Do events hold device time alone, and do results hold what is needed to judge them?"""

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.bench import harness

DEVICE_MS = {"fast": 0.02, "slow": 0.9}


class Queue:
    """A simulated device: it runs behind the host, or waits for it. Times in milliseconds."""

    def __init__(self, holds=True):
        self.host = self.free = 0.0
        self.holds = holds
        self.flushed = 0

    def enqueue(self, milliseconds):
        self.free = max(self.free, self.host) + milliseconds

    def event(self):
        return Moment(self)

    def hold(self, milliseconds):
        if self.holds:
            self.enqueue(milliseconds)

    def flush(self):
        self.flushed += 1

    def synchronize(self):
        self.host = max(self.host, self.free)

    def now(self):
        return self.host / 1e3

    def call(self, host_ms, device_ms):
        def call():
            self.host += host_ms
            self.enqueue(device_ms)

        return call


class Moment:
    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.at = max(self.queue.host, self.queue.free)

    def elapsed_time(self, later):
        return later.at - self.at


def measured(queue, host_ms):
    calls = {name: queue.call(host_ms, ms) for name, ms in DEVICE_MS.items()}
    return harness.interleaved(calls, 7, device=queue)


@given(host_ms=st.floats(0.0, harness.LONGEST_HOLD_MS / 2))
def test_host_time_does_not_leak(host_ms):
    queue = Queue()
    for name, runs in measured(queue, host_ms).items():
        assert runs == pytest.approx([DEVICE_MS[name]] * 7)
    assert queue.flushed == 14


def test_it_would_leak_without_the_wait():
    fast = measured(Queue(holds=False), 2.0)["fast"]
    assert min(fast) > 10 * DEVICE_MS["fast"]


@given(host_ms=st.floats(0.001, 5.0), device_ms=st.floats(0.0, 5.0))
def test_host_us_is_the_hosts_part(host_ms, device_ms):
    queue = Queue()
    found = harness.host_us(queue.call(host_ms, device_ms), device=queue)
    assert found == pytest.approx(1e3 * host_ms)
    assert queue.host >= queue.free  # nothing is left behind


def test_ratio_is_of_neighbours():
    base, ours = [1.0, 2.0, 4.0], [0.5, 1.0, 1.0]  # a clock that drifts
    median, spread = harness.ratio(base, ours)
    assert median == 2.0
    assert spread == 2.0


def test_result_file(tmp_path):
    found = harness.document("x", [{"a": 1}], ["fa2 left out: no"])
    path = harness.write(found, tmp_path / "new")
    assert path == tmp_path / "new" / "x.json"
    stored = json.loads(path.read_text())
    assert stored["schema"] == 1
    assert stored["rows"] == [{"a": 1}]
    assert stored["notes"] == ["fa2 left out: no"]
    assert set(stored) >= {"command", "commit", "date", "device", "name", "versions"}
    assert "notes" not in harness.document("x", [])


def git(answer):
    def run(*_, **__):
        if answer is None:
            raise subprocess.CalledProcessError(128, "git")
        return subprocess.CompletedProcess([], 0, stdout=answer)

    return run


@pytest.mark.parametrize(
    ("answer", "variable", "found"),
    [
        ("bench/\nabc1234\n", "fff", "fff"),
        ("bench/\nabc1234\n", "", "abc1234"),
        (None, "fff", "fff"),
        (None, "", None),
        ("venv/lib/afbs_compile/bench/\nabc1234\n", "", None),  # somebody else's repository
    ],
)
def test_commit(monkeypatch, answer, variable, found):
    monkeypatch.setattr(harness.subprocess, "run", git(answer))
    monkeypatch.setenv("AFBS_COMMIT", variable)
    assert harness.commit() == found


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["/home/me/bin/afbs", "bench", "--output", "/home/me"], "afbs bench"),
        (["bench/attention.py", "--quick", "--output=/x"], "python bench/attention.py --quick"),
        (["bench/attention.py", "--output", "/x", "--quick"], "python bench/attention.py --quick"),
    ],
)
def test_command_has_no_path_of_this_machine(monkeypatch, typed, kept):
    monkeypatch.setattr(harness.sys, "argv", typed)
    assert harness.command() == kept
