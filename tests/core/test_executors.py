"""Helpers in other processes: they do a share of the work, and the policy is the serial one."""

import json
import os
import subprocess
import sys

import pytest

from afbs_compile import executors
from afbs_compile.executors import helpers

WORKLOAD = """
import os, signal, time
import torch, torch.nn.functional as F

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = torch.nn.Linear(64, 3 * 64)
        self.heads.weight.data *= 4

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.heads(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)

def load(log, seconds, fate):
    \"\"\"The model; from now on this process notes what it measures, and takes its time.\"\"\"
    from afbs_compile import profiling

    torch.set_num_threads(1)
    original = profiling.profiled

    def noting(layer, **how):
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        return original(layer, **how)

    profiling.profiled = noting
    torch.manual_seed(0)
    return torch.nn.Sequential(*[Layer() for _ in range(8)])
"""

PROGRAM = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from workload import load

def main(root, executor, fate):
    import afbs_compile
    from afbs_compile import calibrate, leases
    from afbs_compile.timing import Speed

    leases.TIMEOUT_S = 5.0
    calibrate.measure = lambda *_: Speed(1.0, 0.0, 0.5)
    log = root / f"{executor}.log"
    model = load(log, 0.0 if executor == "serial" else 1.0, "lives")
    noise = [torch.randn(1, 256, 64) for _ in range(2)]
    inputs = [0.3 * x + x.cumsum(1) / 16 for x in noise]
    how = {}
    if executor != "serial":
        how = {"executor": executor, "loader": partial(load, log, 0.1, fate)}
    if executor == "ray":
        import ray

        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    policy = afbs_compile.tune(
        model, inputs, min_length=128, max_error=0.3, cache_dir=root / f"{executor}-cache", **how
    )
    plain = json.loads(policy.to_json())["policy"]["tunings"][0]
    plain.pop("seconds"), plain.pop("created")
    if os.environ.get("RANK", "0") == "0":
        (root / f"{executor}.json").write_text(json.dumps([plain, log.read_text().split()]))

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
"""

JOBS = 16


@pytest.fixture
def program(tmp_path):
    """Run the program with an executor: the policy, the processes that measured, what is left."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    (tmp_path / "workload.py").write_text(WORKLOAD)  # Ray pickles what is in `__main__` by value

    def run(executor, fate="lives", launcher=(sys.executable,)):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, str(script), str(tmp_path), executor, fate]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        left = [p.name for p in (tmp_path / f"{executor}-cache/work").iterdir() if p.is_dir()]
        return *json.loads((tmp_path / f"{executor}.json").read_text()), left, done.stderr

    return run


def check(program, executor, **how):
    want, alone, _, _ = program("serial")
    assert (len(alone), len(set(alone))) == (JOBS, 1)
    found, processes, left, _ = program(executor, **how)
    assert found == want
    assert found["complete"]
    assert len(processes) == JOBS
    assert len(set(processes)) == 2
    assert left == []


@pytest.mark.slow
def test_local_processes(program):
    check(program, "local")


@pytest.mark.slow
def test_a_local_helper_that_dies_costs_a_warning(program):
    want, _, _, _ = program("serial")
    found, processes, _, said = program("local", fate="dies")
    assert found == want
    assert (len(processes), len(set(processes))) == (JOBS, 1)
    assert "1 tuning helpers died (exit codes [-9])" in said


@pytest.mark.slow
def test_torchrun_ranks(program):
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    )
    check(program, "torchrun", launcher=launcher)


@pytest.mark.slow
def test_tasks_on_a_ray_cluster(program):
    pytest.importorskip("ray")
    check(program, "ray")


@pytest.mark.parametrize(
    ("executor", "workers", "says"),
    [
        ("dask", None, "executor is 'dask'; give one of local, torchrun, ray"),
        (None, 2, "workers is 2 with executor None"),
        ("torchrun", 2, "it takes none"),
        ("local", 1, "workers is 1; give at least 2"),
        ("ray", 0, "workers is 0"),
    ],
)
def test_what_does_not_fit_is_refused(executor, workers, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        helpers(executor, workers, print)


def test_torchrun_without_torchrun_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="needs torchrun"), helpers("torchrun", None, print):
        pass


def test_ray_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"afbs-compile\[ray\]"), executors.on_ray(print, 2):
        pass
