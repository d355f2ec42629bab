"""Several processes, one tuning: the result is the serial one, and nothing is measured twice.

A program forks workers from a warm process, so that kills fall into the tuning and not into the
imports. Jobs are slowed down, and written to a log when they begin and when they end.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
torch.set_num_threads(1)
import afbs_compile
from afbs_compile import ahead, cache, calibrate, leases, profiling
from afbs_compile.timing import Speed
from dataclasses import replace

LAYERS, INPUTS, LENGTH, SECONDS = 10, 2, 256, 0.1
root = Path(sys.argv[1])
log = root / "log"
calibrate.measure = lambda *layer: Speed(1.0, 0.0, 0.5)
leases.TIMEOUT_S = 2.0
original = profiling.profiled

def write(word, layer):
    name = float(layer.q.double().abs().sum())  # what tells one layer's tensors from another's
    with log.open("a") as file:  # O_APPEND: lines of several processes do not mix
        file.write(json.dumps([word, os.getpid(), name]) + "\\n")

def slowly(layer, **how):
    write("begin", layer)
    time.sleep(SECONDS)
    found = original(layer, **how)
    write("end", layer)
    return found

profiling.profiled = slowly

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = torch.nn.Linear(64, 3 * 64)
        self.heads.weight.data *= 4

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.heads(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)

def tokens():
    noise = torch.randn(1, LENGTH, 64)
    return 0.3 * noise + noise.cumsum(1) / LENGTH**0.5

torch.manual_seed(0)
model = torch.nn.Sequential(*[Layer() for _ in range(LAYERS)])
inputs = [tokens() for _ in range(INPUTS)]
OPTIONS = {"min_length": 128, "max_error": 0.3}
graphs = ahead.recorded(model, inputs, ahead.parse(OPTIONS))

def fork(folder):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            mine = ahead.parse(OPTIONS | {"cache_dir": str(folder)})
            again = [(replace(problem, options=mine), key) for problem, key in graphs]
            ahead.recorded = lambda *_, **__: again
            afbs_compile.tune(model, inputs, cache_dir=folder, **OPTIONS)
            code = 0
        finally:
            os._exit(code)
    return pid

def result(folder):
    (entry,) = cache.entries(folder)
    (tuning,) = entry.policy.tunings
    plain = json.loads(entry.policy.to_json())["policy"]["tunings"][0]
    left = [p.name for p in (folder / "work").iterdir() if p.is_dir()]
    return {n: v for n, v in plain.items() if n not in ("seconds", "created")}, left

def lines():
    found = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    return found

def serial():
    pid = fork(root / "serial")
    assert os.waitpid(pid, 0)[1] == 0
    lines()
    return result(root / "serial")

def round_of(folder, kills, dice):
    \"\"\"Two workers; kill one after the other at random, and start another in its place.\"\"\"
    running, killed = [fork(folder), fork(folder)], []
    while len(killed) < kills:
        time.sleep(dice.uniform(0.0, dice.choice((0.2, 0.2, 3.0))))
        ended = dict(os.waitpid(pid, os.WNOHANG) for pid in running)
        if any(ended):  # a worker that begins now would tune anew
            codes = [code for pid, code in ended.items() if pid]
            return killed, codes + [os.waitpid(pid, 0)[1] for pid in running if pid not in ended]
        victim = running.pop(dice.randrange(2))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        killed.append(victim)
        running.append(fork(folder))
    return killed, [os.waitpid(pid, 0)[1] for pid in running]

def main(kills, seed):
    dice, rounds, (want, _) = random.Random(seed), [], serial()
    left = kills
    while left > 0:
        folder = root / f"round-{len(rounds)}"
        killed, codes = round_of(folder, left, dice)
        found, litter = result(folder)
        rounds.append({"killed": killed, "codes": codes, "same": found == want, "log": lines(),
                       "litter": litter})
        left -= len(killed)
    print(json.dumps({"rounds": rounds, "jobs": LAYERS * INPUTS, "complete": want["complete"]}))

if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]))
"""


def program(folder, kills, seed, timeout=600):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AFBS_CACHE_DIR": str(folder / "none")}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(kills), str(seed)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(report):
    """Every round found the serial result, and measured again only what a kill had lost."""
    assert report["complete"]
    for turn in report["rounds"]:
        assert turn["same"]
        assert turn["codes"] == [0] * len(turn["codes"])
        begun, ended = {}, {}
        for word, pid, job in turn["log"]:
            (begun if word == "begin" else ended).setdefault(job, []).append(pid)
        assert len(ended) == report["jobs"]
        for job, pids in begun.items():
            lost = pids[:-1]
            assert set(lost) <= set(turn["killed"]), (job, pids)
        calls = sum(map(len, begun.values()))
        assert calls - report["jobs"] <= len(turn["killed"])


def figures(report):
    calls = [sum(word == "begin" for word, _, _ in turn["log"]) for turn in report["rounds"]]
    kills = [len(turn["killed"]) for turn in report["rounds"]]
    workers = [len({pid for _, pid, _ in turn["log"]}) for turn in report["rounds"]]
    return f"kills {kills}, calls {calls} for {report['jobs']} jobs, by {workers} workers"


def test_two_kills(tmp_path):
    report = program(tmp_path, 2, 0)
    check(report)
    assert sum(len(turn["killed"]) for turn in report["rounds"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_twenty_kills(tmp_path, seed):
    report = program(tmp_path, 20, seed)
    print(figures(report))  # noqa: T201
    check(report)
    assert sum(len(turn["killed"]) for turn in report["rounds"]) == 20
