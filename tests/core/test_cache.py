"""The cache: a round trip, a miss for anything damaged, nothing lost, never an exception."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from afbs_compile import cache
from afbs_compile.logs import AfbsWarning
from afbs_compile.policy import SCHEMA

KEY = "ab" * 16


def damage(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_round_trip(policy, private_cache):
    path = cache.store(policy())
    assert path == private_cache / "policies" / f"{KEY}.json"
    assert cache.load(KEY) == policy()


def test_given_folder_wins(policy, tmp_path):
    cache.store(policy(), tmp_path / "mine")
    assert cache.load(KEY) is None
    assert cache.load(KEY, tmp_path / "mine") == policy()


def test_nothing_there_is_a_silent_miss():
    assert cache.load(KEY) is None
    assert cache.entries() == []
    assert cache.clear() == []


def test_truncation_at_every_byte_is_a_miss(policy):
    path = cache.store(policy())
    whole = path.read_bytes()
    for end in range(len(whole) - 1):  # without only the final newline it is still whole
        path.write_bytes(whole[:end])
        with pytest.warns(AfbsWarning, match="tuned again"):
            assert cache.load(KEY) is None


def test_a_torn_write_leaves_the_old_file(policy, tuning, monkeypatch):
    path = cache.store(policy())
    before = path.read_bytes()

    def torn(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", torn)
    with pytest.warns(AfbsWarning, match="No space left"):
        assert cache.store(policy(tuning(tau=0.1))) is None
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_policy_of_another_model_is_a_miss(policy):
    text = policy().to_json()
    damage(cache.path_of("other"), text)
    with pytest.warns(AfbsWarning, match="another model"):
        assert cache.load("other") is None


def test_newer_schema_is_a_miss_and_is_kept_aside(policy):
    newer = policy().to_json().replace(f'"schema": {SCHEMA}', '"schema": 99')
    path = cache.path_of(KEY)
    damage(path, newer)
    with pytest.warns(AfbsWarning, match="update afbs-compile"):
        assert cache.load(KEY) is None
    assert cache.store(policy()) == path
    assert cache.load(KEY) == policy()
    assert path.with_name(f"{path.name}.unusable").read_text() == newer


def test_store_keeps_what_others_stored(policy, tuning):
    cache.store(policy(tuning(1000), tuning(4096, tau=0.5)))
    cache.store(policy(tuning(4096, tau=0.7), tuning(8192)))
    stored = cache.load(KEY)
    assert [t.bucket for t in stored.tunings] == [1024, 4096, 8192]
    assert stored.find_any(4096).sites["layers.0.attn"].heads[0].tau == 0.7


STORE_MANY = """
import sys
from dataclasses import replace
from pathlib import Path
from afbs_compile import cache
from afbs_compile.policy import Policy

document, folder, first = sys.argv[1:]
policy = Policy.read(Path(document))
for number in range(int(first), int(first) + 20):
    tuning = replace(policy.tunings[0], options={"max_error": number / 100})
    assert cache.store(replace(policy, tunings=(tuning,)), Path(folder))
"""


def test_two_processes_store_at_once(tmp_path):
    document = Path(__file__).with_name("policy_v1.json")
    both = [
        subprocess.Popen([sys.executable, "-c", STORE_MANY, document, tmp_path, str(first)])
        for first in (0, 20)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert len(cache.load(KEY, tmp_path).tunings) == 40


def test_folder_that_cannot_be_made_warns_and_names_the_way_out(policy, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("here a folder is needed")
    with pytest.warns(AfbsWarning, match="a-file.*AFBS_CACHE_DIR") as caught:
        assert cache.store(policy(), blocked) is None
    assert len(caught) == 1
    assert cache.load(KEY, blocked) is None


def test_held_lock_warns(policy, monkeypatch):
    path = cache.path_of(KEY)
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    with cache.FileLock(f"{path}.lock"), pytest.warns(AfbsWarning, match="could not be kept"):
        assert cache.store(policy()) is None


def test_the_same_warning_comes_once():
    damage(cache.path_of(KEY), "{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            cache.load(KEY)
    assert len(caught) == 1


def test_entries_tell_usable_from_damaged(policy):
    cache.store(policy())
    damage(cache.path_of("broken"), "{")
    good, bad = cache.entries()
    assert (good.key, good.policy, good.problem) == (KEY, policy(), None)
    assert good.size_bytes == good.path.stat().st_size
    assert (bad.key, bad.policy) == ("broken", None)
    assert "broken.json" in bad.problem


def test_remove_takes_one_model_and_clear_takes_all(policy):
    for key in ("a", "ab", "c"):
        cache.store(policy(key=key))
    damage(cache.path_of("a").with_name("a.json.unusable"), "{")
    assert sorted(path.name for path in cache.remove("a")) == ["a.json", "a.json.unusable"]
    assert cache.remove("a") == []
    assert [entry.key for entry in cache.entries()] == ["ab", "c"]
    assert len(cache.clear()) == 2
    assert cache.entries() == []


def test_key_cannot_leave_the_folder():
    with pytest.raises(ValueError, match="model key"):
        cache.remove("../../etc/passwd")


def test_unfinished_work_goes_with_the_policy(policy, private_cache):
    cache.store(policy())
    mine, other = (private_cache / "work" / f"{key}-1-2" for key in (KEY, "cd" * 16))
    for folder in (mine, other):
        folder.mkdir(parents=True)
        (folder / "a.job").touch()
    assert mine in cache.remove(KEY)
    assert (mine.exists(), other.exists()) == (False, True)
    cache.clear()
    assert not other.exists()
