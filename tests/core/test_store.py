"""Measurements of an unfinished tuning: a round trip, a miss for damage, one tuning's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afbs_compile import store
from afbs_compile.evaluators import ProfileEvaluator
from afbs_compile.logs import AfbsWarning
from afbs_compile.store import Store, decode, encode, from_arrays, input_digest, to_arrays

JOB = {"site": "layers.0", "input": "x"}
TABLE = {"error": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
KEY = "ab" * 16

tables = st.dictionaries(
    st.text(st.sampled_from("abcdef_"), min_size=1),
    arrays.arrays(
        st.sampled_from([np.float32, np.float64, np.int32, np.int64, bool]),
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=4, min_side=0),
    ),
    max_size=4,
)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n], equal_nan=True)
        if one[n].dtype.kind == "f"
        else np.array_equal(one[n], other[n])
        for n in one
    )


@given(tables, st.none() | tables, st.integers(1, 99))
def test_an_evaluator_comes_back(whole, prefix, blocks):
    if not whole or prefix == {}:
        return  # a profile has tables
    about, content = decode(encode(*to_arrays(ProfileEvaluator(whole, prefix, blocks))))
    back = ProfileEvaluator(**from_arrays(about, content))
    assert same(back.tables, whole)
    assert back.blocks == blocks
    assert back.prefix is None if prefix is None else same(back.prefix, prefix)


@given(st.data())
def test_damage_anywhere_is_noticed(data):
    content = bytearray(encode(JOB, TABLE))
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="digest"):
        decode(bytes(content))


def test_what_is_saved_is_found_and_measured_once():
    asked = []

    def measure():
        asked.append(1)
        return {"kind": "k"}, TABLE

    with Store(KEY, {"bucket": 1}, {}) as first:
        values, found = first.once(JOB, measure)
    with Store(KEY, {"bucket": 1}, {}) as second:
        again, table = second.once(JOB, measure)
    assert asked == [1]
    assert values == again == {"kind": "k"}
    assert same(found, table)


def test_a_damaged_file_warns_and_is_measured_again():
    with Store(KEY, {}, {}) as kept:
        kept.save(JOB, {}, TABLE)
        kept.path(JOB).write_bytes(b"no archive")
        with pytest.warns(AfbsWarning, match="measured again"):
            values, _ = kept.once(JOB, lambda: ({"new": 1}, TABLE))
        assert values == {"new": 1}
        assert kept.load(JOB)[0] == {"new": 1}


@pytest.mark.parametrize(
    "other",
    [
        ("cd" * 16, {"max_error": 0.1}, {"torch": "2"}),
        (KEY, {"max_error": 0.2}, {"torch": "2"}),
        (KEY, {"max_error": 0.1}, {"torch": "3"}),
    ],
)
def test_another_tuning_is_not_used(other):
    with Store(KEY, {"max_error": 0.1}, {"torch": "2"}) as mine, Store(*other) as theirs:
        mine.save(JOB, {}, TABLE)
        assert theirs.load(JOB) is None
        assert mine.load(JOB) is not None


@pytest.mark.parametrize("change", [{"site": "layers.1"}, {"input": "y"}, {"heads": 2}])
def test_another_job_is_not_used(change):
    with Store(KEY, {}, {}) as kept:
        kept.save(JOB, {}, TABLE)
        assert kept.load(JOB | change) is None


def test_finished_work_goes_when_the_last_worker_leaves():
    with Store(KEY, {}, {}) as first:
        first.save(JOB, {}, TABLE)
        with Store(KEY, {}, {}) as second:
            second.finish(sweep=True)
        assert first.load(JOB) is not None
    assert not first.folder.exists()


def test_unfinished_work_stays_until_the_tuning_is_swept():
    with Store(KEY, {"a": 1}, {"torch": "1"}) as old:
        old.save(JOB, {}, TABLE)
    with Store(KEY, {"a": 2}, {"torch": "1"}) as foreign:
        foreign.save(JOB, {}, TABLE)
    assert old.folder.exists()
    with Store(KEY, {"a": 1}, {"torch": "2"}) as new:
        new.finish(sweep=True)
    assert not old.folder.exists()
    assert foreign.folder.exists()


def test_a_cache_that_cannot_be_written_still_measures(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    kept = Store(KEY, {}, {}, blocked)
    with pytest.warns(AfbsWarning, match="AFBS_CACHE_DIR"):
        kept.__enter__()
    with kept.left:
        assert kept.once(JOB, lambda: ({"v": 1}, TABLE))[0] == {"v": 1}
        assert kept.load(JOB) is not None
    assert not kept.folder.exists()


def test_a_folder_deleted_meanwhile_costs_a_warning():
    with Store(KEY, {}, {}) as kept:
        store.shutil.rmtree(kept.folder)
        with pytest.warns(AfbsWarning, match="cannot be written"):
            assert kept.once(JOB, lambda: ({"v": 1}, TABLE))[0] == {"v": 1}


def test_inputs_are_told_apart_by_content_not_by_weights():
    x, weight = torch.arange(4.0), torch.nn.Parameter(torch.ones(2))
    trained = torch.nn.Parameter(torch.zeros(2))
    assert input_digest([x, weight, 3]) == input_digest([x.clone(), trained, 3])
    digests = {
        input_digest(values)
        for values in ([x, weight, 3], [x + 1, weight, 3], [x, weight, 4], [x, 3], [x.int(), 3])
    }
    assert len(digests) == 5
