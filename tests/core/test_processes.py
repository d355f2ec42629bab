"""Two processes, one model: the second reads what the first found, and compiles nothing anew."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, torch, torch.nn.functional as F
import afbs_compile
from afbs_compile import calibrate
from afbs_compile.policy import Policy
from afbs_compile.timing import Speed

calibrate.measure = lambda *_: Speed(1.0, 0.0, 0.5)
torch.manual_seed(0)
heads = torch.nn.Linear(128, 3 * 128)
heads.weight.data *= 3
x = torch.randn(1, 768, 128).cumsum(1) / 20

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in self.heads(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

model, options = Model(), {"min_length": 128, "max_error": 0.3}
if len(sys.argv) > 1:
    options["policy"] = sys.argv[1]
with torch.no_grad():
    out = torch.compile(model, backend="afbs", options=options)(x)
    error = ((out - model(x)).abs().sum() / model(x).abs().sum()).item()
calibration = afbs_compile.explain().calibration
counters = torch._dynamo.utils.counters["inductor"]
print(json.dumps({
    "error": error, "cache": calibration.cache, "path": calibration.policy_path,
    "hits": counters["fxgraph_cache_hit"], "misses": counters["fxgraph_cache_miss"],
}))
"""


def process(folder, *arguments):
    """Run the program in a process of its own."""
    environment = os.environ | {
        "AFBS_CACHE_DIR": str(folder / "policies"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_another_policy_hits_inductors_caches_and_still_counts(tmp_path):
    first = process(tmp_path)
    assert first["cache"] == "miss"
    assert 1e-3 < first["error"] < 0.3
    second = process(tmp_path)
    assert (second["cache"], second["misses"]) == ("hit", 0)
    assert second["error"] == pytest.approx(first["error"], rel=1e-3)
    document = json.loads((tmp_path / first["path"]).read_text())
    for tuning in document["policy"]["tunings"]:
        for site in tuning["sites"].values():
            for head in site["heads"]:
                head["tau"], head["mode"] = 1.0, "sparse"
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps(document))
    third = process(tmp_path, str(dense))
    assert (third["cache"], third["misses"]) == ("file", 0)
    assert third["hits"] > 0
    assert third["error"] < 1e-5
