"""A tuning that ends early leaves a valid policy, and a later start goes on where it stopped."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile import ahead, backend, cache, calibrate, capture, measurements, profiling
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import Policy
from afbs_compile.report import JOURNAL
from afbs_compile.runner import RUNNERS
from afbs_compile.timing import Speed
from afbs_compile.tuner.objective import QueryBlocks

LAYERS, LENGTH = 4, 384
OPTIONS = {"min_length": 128, "max_error": 0.3}
NAMES = [f"layers.{n}" for n in range(LAYERS)]
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "cheap")


class Layer(nn.Module):
    """Causal self-attention whose heads look at few tokens."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(64, 3 * 64)
        self.heads.weight.data *= 4

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.heads(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layers()


class Layers(nn.Module):
    """Some layers in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(seed=0):
    noise = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(seed))
    return 0.3 * noise + noise.cumsum(1) / LENGTH**0.5


@pytest.fixture
def cheap(monkeypatch):
    """Graphs run as they are, and sparse calls count as faster."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, options: gm.forward)
    monkeypatch.setattr(calibrate, "measure", lambda *layer: Speed(1.0, 0.0, 0.5))
    JOURNAL.clear()
    RUNNERS.clear()


@pytest.fixture
def measured(monkeypatch):
    """How many jobs were measured so far; `raise_at` interrupts one of them."""
    jobs = Jobs()
    original = profiling.profiled

    def counting(layer, **how):
        jobs.count += 1
        if jobs.count == jobs.raise_at:
            raise KeyboardInterrupt
        return original(layer, **how)

    monkeypatch.setattr(profiling, "profiled", counting)
    return jobs


class Jobs:
    """A counter."""

    count, raise_at = 0, None

    def since(self):
        """Jobs since this was last asked."""
        count, self.count = self.count, 0
        return count


def start(x, **options):
    """A process's first call; the tuning that it leaves."""
    torch._dynamo.reset()
    JOURNAL.clear()
    with torch.no_grad():
        torch.compile(model(), backend="afbs", options=OPTIONS | options)(x)
    return newest()


def newest():
    (entry,) = cache.entries()
    return entry.policy.tunings[-1]


def tuned(tuning):
    """Names of the sites that are not left for later."""
    return [name for name in NAMES if tuning.sites[name].reason not in profiling.UNFINISHED]


def timeless(tuning):
    """A tuning without what no two runs share."""
    return replace(tuning, seconds=0.0, created="")


def serial(tmp_path, *inputs, **options):
    """What a tuning finds that nothing stops, in a cache of its own."""
    torch._dynamo.reset()
    folder = tmp_path / "serial"
    policy = afbs_compile.tune(model(), list(inputs), cache_dir=folder, **OPTIONS, **options)
    return timeless(policy.tunings[0])


def work_folders(private_cache):
    return [path for path in (private_cache / "work").glob("*") if path.is_dir()]


def test_a_budget_is_kept_and_every_start_gets_on(measured, tmp_path, private_cache):
    want = serial(tmp_path, tokens())
    measured.since()
    for done in range(1, LAYERS + 1):
        tuning = start(tokens(), tuning_budget_s=0)
        assert tuned(tuning) == NAMES[:done]
        assert tuning.complete is (done == LAYERS)
        assert measured.since() == 1
        left = [site for site in afbs_compile.explain().sites if site.reason == "tuning budget"]
        assert [site.name for site in left] == NAMES[done:]
        assert len(work_folders(private_cache)) == (done < LAYERS)
    assert timeless(tuning) == want
    start(tokens(), tuning_budget_s=0)
    assert (measured.since(), afbs_compile.explain().calibration.cache) == (0, "hit")


def test_a_budget_in_the_middle(measured, monkeypatch, tmp_path):
    want = serial(tmp_path, tokens())
    ticks = itertools.count()
    monkeypatch.setattr(profiling.time, "monotonic", lambda: float(next(ticks)))
    measured.since()
    first = start(tokens(), tuning_budget_s=2.5)
    assert 1 < len(tuned(first)) < LAYERS
    assert measured.since() == len(tuned(first))
    assert timeless(start(tokens())) == want
    assert measured.since() == LAYERS - len(tuned(first))


def test_ctrl_c_keeps_a_valid_policy(measured, tmp_path):
    want = serial(tmp_path, tokens())
    measured.since()
    measured.raise_at = 3
    with pytest.raises(KeyboardInterrupt):
        start(tokens())
    assert tuned(newest()) == NAMES[:2]
    assert not newest().complete
    assert newest().max_error <= 0.3
    measured.raise_at = None
    measured.since()
    assert timeless(start(tokens())) == want
    assert measured.since() == LAYERS - 2


def test_on_another_input_only_what_is_missing_is_tuned(measured):
    first = start(tokens(), tuning_budget_s=0)
    measured.since()
    second = start(tokens(seed=1))
    assert measured.since() == LAYERS - 1
    assert second.complete
    assert second.sites[NAMES[0]] == first.sites[NAMES[0]]


def test_no_budget_unlearns_what_was_tuned(measured):
    whole = start(tokens())
    measured.since()
    policy = afbs_compile.tune(model(), [tokens(seed=1)], tuning_budget_s=0, **OPTIONS)
    assert measured.since() == 1
    (tuning,) = policy.tunings
    assert tuning.complete
    assert [tuning.sites[name] for name in NAMES[1:]] == [whole.sites[n] for n in NAMES[1:]]


def test_tuning_ahead_goes_on_too(measured, tmp_path):
    inputs = [tokens(0), tokens(1)]
    want = serial(tmp_path, *inputs)
    measured.since()
    measured.raise_at = 4  # the second input of the second layer
    with pytest.raises(KeyboardInterrupt):
        afbs_compile.tune(model(), inputs, **OPTIONS)
    measured.raise_at = None
    measured.since()
    torch._dynamo.reset()
    policy = afbs_compile.tune(model(), inputs, **OPTIONS)
    assert measured.since() == 2 * LAYERS - 3
    assert timeless(policy.tunings[0]) == want


def test_ctrl_c_ahead_of_time_keeps_a_valid_policy(measured, tmp_path):
    want = serial(tmp_path, tokens())
    measured.since()
    measured.raise_at = 3
    with pytest.raises(KeyboardInterrupt):
        afbs_compile.tune(model(), [tokens()], **OPTIONS)
    assert measured.since() == 3  # none after it
    assert tuned(newest()) == NAMES[:2]
    assert not newest().complete
    measured.raise_at = None
    torch._dynamo.reset()
    policy = afbs_compile.tune(model(), [tokens()], **OPTIONS)
    assert measured.since() == LAYERS - 2
    assert timeless(policy.tunings[0]) == want


def test_ctrl_c_before_anything_is_known_keeps_nothing(measured):
    measured.raise_at = 1
    with pytest.raises(KeyboardInterrupt):
        afbs_compile.tune(model(), [tokens()], **OPTIONS)
    assert cache.entries() == []


def test_tuning_ahead_is_the_models_own_run(measured, monkeypatch, tmp_path):
    """One pass an input, and a second one only as far as the first layer, whose speed is taken."""
    ran, original = Counter(), capture.step

    def counting(interpreter, node):
        ran[node.name] += 1
        return original(interpreter, node)

    monkeypatch.setattr(capture, "step", counting)
    inputs = [tokens(seed) for seed in range(3)]
    own = serial(tmp_path / "own", *inputs)
    assert ran["output"] == len(inputs)
    again = [name for name, times in ran.items() if times > len(inputs)]
    assert 0 < len(again) < len(ran) / 2
    ran.clear()
    apart = serial(tmp_path / "apart", *inputs, tuning_budget_s=1e6)
    assert ran["output"] == 0
    assert own.sites == apart.sites
    assert own.evaluations == apart.evaluations


def test_nothing_is_measured_twice_where_nothing_can_be_kept(measured, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(AfbsWarning) as told:
        policy = afbs_compile.tune(
            model(), [tokens()], cache_dir=tmp_path / "file" / "cache", **OPTIONS
        )
    assert any("cannot be kept" in str(one.message) for one in told)
    assert measured.since() == LAYERS
    assert policy.tunings[0].complete


def test_the_own_run_changes_what_the_graph_changes():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x) + self.calls

    counting, x = Counting(), tokens()
    recorder = ahead.Recorder(ahead.parse(OPTIONS), measuring=True)
    compiled = torch.compile(counting, backend=recorder)
    with torch.no_grad():
        outputs = [compiled(x) for _ in range(2)]
        want = counting.layer(x)
    assert counting.calls == 2
    for n, output in enumerate(outputs, 1):
        torch.testing.assert_close(output, want + n)


def test_other_options_measure_anew(measured):
    start(tokens(), tuning_budget_s=0)
    measured.since()
    torch._dynamo.reset()
    with torch.no_grad():
        options = OPTIONS | {"max_error": 0.2}
        torch.compile(model(), backend="afbs", options=options)(tokens())
    assert measured.since() == LAYERS


def test_a_damaged_measurement_is_made_again(measured, tmp_path, private_cache):
    want = serial(tmp_path, tokens())
    start(tokens(), tuning_budget_s=0)
    measured.since()
    (folder,) = work_folders(private_cache)
    (file,) = folder.glob("layers_0-*.job")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.warns(AfbsWarning, match="measured again"):
        tuning = start(tokens())
    assert measured.since() == LAYERS
    assert timeless(tuning) == want


def test_a_given_file_of_an_unfinished_tuning_is_used_as_it_is(tmp_path):
    start(tokens(), tuning_budget_s=0)
    file = tmp_path / "mine.json"
    file.write_text(Policy.read(afbs_compile.explain().calibration.policy_path).to_json())
    torch._dynamo.reset()
    JOURNAL.clear()
    with torch.no_grad():
        torch.compile(model(), backend="afbs", options=OPTIONS | {"policy": file})(tokens())
    assert afbs_compile.explain().rewritten == 1
    assert afbs_compile.explain().reasons["tuning budget"] == LAYERS - 1


@pytest.mark.slow
def test_the_kernel_is_not_asked_twice(monkeypatch, tmp_path):
    """The `direct` evaluator: each answer is kept, and a budget ends the search between two."""
    want = serial(tmp_path, tokens(), evaluator="direct")
    asked = []
    original = measurements.DirectEvaluator.__call__

    def counting(self, u, fidelity):
        asked.append((self.site, str(fidelity), *np.asarray(u).tolist()))
        return original(self, u, fidelity)

    monkeypatch.setattr(measurements.DirectEvaluator, "__call__", counting)
    for _ in range(5):
        tuning = start(tokens(), evaluator="direct", tuning_budget_s=0)
        assert not tuning.complete
    assert len(asked) == 5
    sink = calibrate.Sink
    monkeypatch.setattr(calibrate, "Sink", type("Stopping", (sink,), {"__setitem__": stopping}))
    with pytest.raises(KeyboardInterrupt):
        start(tokens(), evaluator="direct")
    assert tuned(newest()) == NAMES[:1]
    monkeypatch.setattr(calibrate, "Sink", sink)
    assert timeless(start(tokens(), evaluator="direct")) == want
    assert len(set(asked)) == len(asked)
    assert any(entry[1] == str(QueryBlocks(1.0)) for entry in asked)


def stopping(self, name, result):
    """Ctrl-C once the first site is known."""
    super(type(self), self).__setitem__(name, result)
    raise KeyboardInterrupt
