"""Options: what is taken, what is forwarded, and what a refusal says."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from afbs_compile import options
from afbs_compile.kernels import compensation, scores
from afbs_compile.options import MEAN_ERROR_SHARE, Options, parse
from afbs_compile.tuner import strategies


def test_nothing_asked_gives_the_defaults():
    assert parse() == parse({}) == parse(None, mode=None) == Options()


def test_every_option_of_ours_is_checked():
    names = set(Options.__dataclass_fields__) - {"inductor"}
    assert set(options.CHECKS) == names


def test_strategies_are_those_of_the_tuner():
    assert set(options.STRATEGIES) == set(strategies.STRATEGIES)


def test_selectors_and_compensations_are_those_of_the_kernels():
    assert options.SELECTORS == scores.SELECTORS
    assert options.COMPENSATIONS == compensation.COMPENSATIONS


def test_values_are_taken():
    asked = {
        "max_error": 1,
        "mean_error": np.float32(0.25),
        "policy": "~/p.json",
        "cache_dir": Path("/c"),
        "selector": "mean",
        "min_length": np.int64(128),
    }
    taken = parse(asked)
    assert taken.max_error == 1.0
    assert type(taken.max_error) is float
    assert taken.mean_error_budget == 0.25
    assert taken.policy == Path.home() / "p.json"
    assert taken.cache_folder == Path("/c")
    assert (taken.selector, taken.min_length) == ("mean", 128)


def test_inductor_options_and_mode_are_forwarded_and_options_win():
    patches = parse({"triton.cudagraphs": False, "max-autotune": True}, "reduce-overhead").inductor
    assert patches == {"triton.cudagraphs": False, "max_autotune": True}


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "0.1", None])
def test_max_error_out_of_range(value):
    with pytest.raises(ValueError, match=r"'max_error' is .*give a number from 0 to 1"):
        parse({"max_error": value})


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"mean_error": -1}, "'mean_error' is -1; give a number"),
        ({"min_length": 0}, "at least 1"),
        ({"min_length": True}, "whole number"),
        ({"min_length": 2.5}, "whole number"),
        ({"policy": 3}, "give a path"),
        ({"policy": ""}, "give a path"),
        ({"cache_dir": b"x"}, "give a path"),
        ({"tuning_budget_s": -1}, "'tuning_budget_s' is -1; give a number of seconds"),
        ({"tuning_budget_s": float("inf")}, "number of seconds"),
        ({"tuning_budget_s": True}, "number of seconds"),
        ({"calibration_calls": 0}, "at least 1"),
        ({"strategy": "afbs_bo"}, "did you mean 'afbs-bo'.*give one of"),
        ({"evaluator": "guess"}, "profile, direct"),
        ({"fidelity": 1}, "query-blocks, sequence-length"),
        ({"selector": "sub9"}, "did you mean 'sub8'"),
        ({"compensation": "tangents"}, "did you mean 'tangent'"),
        ({"max_eror": 0.1}, "'max_eror' is unknown; did you mean 'max_error'.*min_length"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"inductor": {}}, "'inductor' is unknown"),
        ({7: 1}, "option 7 is unknown"),
        ({"max_autotune": "yes"}, "'max_autotune' is 'yes', a str; give a value like False"),
    ],
)
def test_bad_options_say_what_is_needed(asked, says):
    with pytest.raises(ValueError, match=says):
        parse(asked)


def test_unknown_mode_names_the_modes():
    with pytest.raises(ValueError, match=r"'fast' is unknown; give one of default.*max-autotune"):
        parse(mode="fast")


def test_mean_error_defaults_to_a_share():
    assert Options(max_error=0.1).mean_error_budget == pytest.approx(0.1 * MEAN_ERROR_SHARE)
    assert Options(mean_error=0.0).mean_error_budget == 0.0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"max_error": 0.1}, False),
        ({"mean_error": 0.01}, False),
        ({"evaluator": "direct"}, False),
        ({"fidelity": "sequence-length"}, False),
        ({"selector": "mean"}, False),
        ({"compensation": "tangent"}, False),
        ({"policy": Path("p")}, True),
        ({"cache_dir": Path("c")}, True),
        ({"min_length": 1}, True),
        ({"tuning_budget_s": 1.0}, True),
        ({"inductor": {"debug": True}}, True),
    ],
)
def test_fingerprint_changes_with_what_is_tuned_only(change, same):
    changed = Options(**change).tuning_fingerprint()
    assert (changed == Options().tuning_fingerprint()) is same


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path))
    assert Options().cache_folder == tmp_path
    monkeypatch.delenv("AFBS_CACHE_DIR")
    assert Options().cache_folder.name == "afbs-compile"
    assert not options.disabled()
    monkeypatch.setenv("AFBS_DISABLE", "1")
    assert options.disabled()
    monkeypatch.setenv("AFBS_DISABLE", "0")
    assert not options.disabled()
    assert options.log_words() == []
    monkeypatch.setenv("AFBS_LOG", "Debug, +passes,")
    assert options.log_words() == ["Debug", "+passes"]


def test_only_options_reads_the_environment():
    root = Path(options.__file__).parents[1]
    folders = ("afbs_compile", "kernels", "passes", "tuner")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    readers = {p.name for p in files if re.search(r"os\.environ|getenv", p.read_text())}
    assert readers == {"options.py"}


def test_limits_take_the_place_of_the_mean_error():
    limited = parse({"max_kl": 0.02})
    assert limited.limited
    assert limited.error_cap > parse({}).error_cap
    assert limited.tuning_fingerprint()["max_kl"] == 0.02
    assert "max_kl" not in parse({}).tuning_fingerprint()
    with pytest.raises(ValueError, match="exclude each other"):
        parse({"max_kl": 0.02, "mean_error": 0.05})
    with pytest.raises(ValueError, match="afbs-bo"):
        parse({"max_ppl_increase": 0.01, "strategy": "bisect"})


@pytest.mark.parametrize("name", ["max_kl", "max_ppl_increase"])
@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, True, "0.1"])
def test_limits_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"'{name}' is .*above 0, or None"):
        parse({name: value})
