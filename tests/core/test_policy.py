"""The policy: its document round-trips, and what is wrong with a document is said."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.policy import (
    DECISIONS,
    MODES,
    SCHEMA,
    Head,
    Policy,
    PolicyError,
    Site,
    Tuning,
    bucket_of,
)

DOCUMENT = Path(__file__).with_name("policy_v1.json").read_text()
FRACTION = st.floats(0, 1)
MEASURED = st.none() | st.floats(0, 1e6)
NAME = st.text(min_size=1, max_size=8)

HEADS = st.builds(
    Head,
    mode=st.sampled_from(MODES),
    tau=FRACTION,
    theta=st.floats(-1, 1),
    lambda_=st.none() | st.floats(-100, 100),
    window=st.integers(1, 2**40),
    sink=st.integers(0, 4096),
    neighbours=st.integers(0, 64),
    error=MEASURED,
    density=st.none() | FRACTION,
)


@st.composite
def sites(draw, name):
    kv_heads = draw(st.integers(1, 3))
    count = kv_heads * draw(st.integers(1, 3))
    return Site(
        name=name,
        heads=tuple(draw(st.lists(HEADS, min_size=count, max_size=count))),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 512)),
        mask=draw(st.sampled_from(["causal", "full", "window"])),
        decision=draw(st.sampled_from(DECISIONS)),
        reason=draw(st.none() | NAME),
        seconds_dense=draw(MEASURED),
        seconds_sparse=draw(MEASURED),
    )


@st.composite
def tunings(draw):
    length = draw(st.integers(1, 2**20))
    names = draw(st.lists(NAME, max_size=3, unique=True))
    return Tuning(
        bucket=bucket_of(length),
        length=length,
        options=draw(st.dictionaries(NAME, FRACTION | NAME, max_size=3)),
        complete=draw(st.booleans()),
        evaluations=draw(st.integers(0, 10**6)),
        cost_dense_passes=draw(st.floats(0, 1e6)),
        seconds=draw(st.floats(0, 1e6)),
        created=draw(NAME),
        device=draw(NAME),
        versions=draw(st.dictionaries(NAME, NAME, max_size=3)),
        inputs=tuple(draw(st.lists(NAME, max_size=3))),
        sites={name: draw(sites(name)) for name in names},
    )


@st.composite
def policies(draw):
    policy = Policy(draw(st.sampled_from(["a", "0f" * 16])), draw(st.none() | NAME))
    for drawn in draw(st.lists(tunings(), max_size=3)):
        policy = policy.with_tuning(drawn)
    return policy


@given(drawn=policies())
def test_round_trip(drawn):
    assert Policy.from_json(drawn.to_json()) == drawn


@given(drawn=policies())
def test_document_is_plain_sorted_json(drawn):
    document = json.loads(drawn.to_json())
    assert drawn.to_json() == json.dumps(document, sort_keys=True, indent=1) + "\n"
    assert document["schema"] == SCHEMA


@given(length=st.integers(1, 2**40))
def test_lengths_of_a_bucket_differ_by_a_quarter_at_most(length):
    bucket = bucket_of(length)
    assert bucket / 1.25 < length <= bucket or (bucket == length < 8)
    assert bucket_of(bucket) == bucket


@given(power=st.integers(3, 40))
def test_four_buckets_an_octave(power):
    start = 2**power
    lengths = (start + step * start // 8 for step in range(1, 9))
    assert len({bucket_of(length) for length in lengths}) == 4


def test_bucket_of_nothing():
    with pytest.raises(ValueError, match="at least 1 token"):
        bucket_of(0)


def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in members:
            yield from places(member, (*path, name))


def changed(document, path, change):
    """The document with the value at `path` changed in place."""
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    change(parent, path[-1])
    return json.dumps(document)


FREE = {"options", "versions", "inputs", "sites"}  # members of these may be missing
PLACES = [path for path in places(json.loads(DOCUMENT)) if path]
FIELDS = [p for p in PLACES if isinstance(p[-1], str) and not FREE.intersection(p[-2:-1])]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_wrong_type_anywhere_is_refused(path):
    for wrong in (True, [1], {"x": {}}, [[]]):
        text = changed(
            json.loads(DOCUMENT),
            path,
            lambda at, name, w=wrong: at.__setitem__(name, w),
        )
        if text == json.dumps(json.loads(DOCUMENT)):  # True == 1, so compare the texts
            continue
        with pytest.raises(PolicyError):
            Policy.from_json(text)


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_missing_field_anywhere_is_refused(path):
    text = changed(json.loads(DOCUMENT), path, lambda at, name: at.pop(name))
    with pytest.raises(PolicyError, match=r"missing|`schema` and `policy`"):
        Policy.from_json(text)


@pytest.mark.parametrize("end", range(0, len(DOCUMENT) - 1, 7))
def test_truncation_is_refused(end):
    with pytest.raises(PolicyError, match="delete it or make it again"):
        Policy.from_json(DOCUMENT[:end])


def with_head(**change):
    document = json.loads(DOCUMENT)
    document["policy"]["tunings"][0]["sites"]["layers.0.attn"]["heads"][1] |= change
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (with_head(tau=1.5), r"sites\.layers\.0\.attn\.heads\[1\]\.tau is 1\.5; needed: a number"),
        (with_head(mode="sparce"), "mode is 'sparce'; needed: one of dense, sparse, window"),
        (with_head(mode="window", window=0), "window is 0; needed: at least 1"),
        (with_head(sink=-1), "sink is -1"),
        (with_head(neighbours=-1), "neighbours is -1"),
        (with_head(neighbours=1.0), "neighbours is 1.0; needed: a whole number"),
        (with_head(theta=-1.1), "theta is -1.1"),
        (with_head(error=-1), "error is -1"),
        (with_head(density=1.01), "density is 1.01"),
        (with_head(colour=1), r"heads\[1\]\.colour is no known field"),
        (with_head(tau=10).replace("10", "1e999"), "tau is inf; needed: a finite number"),
        (with_head(tau=math.nan), "NaN, which is not JSON"),
        (DOCUMENT.replace('"kv_heads": 1', '"kv_heads": 3'), "kv_heads is 3; needed: a divisor"),
        (DOCUMENT.replace('"bucket": 4096', '"bucket": 8192'), "bucket is 8192; needed: 4096"),
        (DOCUMENT.replace('"name": "layers.0.attn"', '"name": "x"'), "name is 'x'; needed"),
        (DOCUMENT.replace('"model": "abab', '"model": "../b'), "model is '../b"),
        (DOCUMENT.replace('"schema": 1', '"schema": 4'), "schema is 4.*update afbs-compile"),
        (DOCUMENT.replace('"schema": 1', '"schema": 0'), "schema is 0; needed: 1"),
        (DOCUMENT.replace('"schema": 1', '"schema": 1, "schema": 1'), "same name twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", r"the document is \[\]; needed"),
    ],
)
def test_message_names_place_and_need(text, says):
    with pytest.raises(PolicyError, match=says):
        Policy.from_json(text)


def test_twice_the_same_tuning_is_refused(policy, tuning):
    with pytest.raises(ValueError, match="each bucket and options once"):
        policy(tuning(), tuning(tau=0.5))


def test_unreadable_files_say_which(tmp_path):
    missing = tmp_path / "none.json"
    with pytest.raises(PolicyError, match=r"none\.json cannot be read.*No such file"):
        Policy.read(missing)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"binary\.json cannot be read"):
        Policy.read(binary)


def test_find_by_bucket_and_options(policy, tuning):
    small, large, loose = tuning(1000), tuning(4096), tuning(4096, max_error=0.5)
    found = policy(small, large, loose)
    assert found.find(1024, small.options) == small
    assert found.find(4096, loose.options) == loose
    assert found.find(2048, small.options) is None
    assert found.find(4096, small.options | {"strategy": "x"}) is None


def test_find_any_takes_the_newest_complete_one(policy, tuning):
    old = tuning(created="2026-01-01")
    new = tuning(created="2026-01-02", max_error=0.3)
    partial = tuning(created="2026-01-03", max_error=0.4, complete=False)
    assert policy(old, new, partial).find_any(4096) == new
    assert policy(partial).find_any(4096) == partial
    assert policy(old).find_any(8192) is None


def test_find_longer_takes_the_closest_within_twice_the_length(policy, tuning):
    found = policy(tuning(4096), tuning(3000), tuning(8192))
    assert found.find_longer(2500).length == 3000
    assert found.find_longer(3001).length == 4096
    assert found.find_longer(1000) is None
    assert found.find_longer(9000) is None


def test_buckets_of_schema_1_become_finer(policy):
    document = json.loads(DOCUMENT)
    (stored,) = document["policy"]["tunings"]
    stored["length"], stored["bucket"] = 2100, 4096  # the next power of two
    assert Policy.from_json(json.dumps(document)).tunings[0].bucket == bucket_of(2100) == 2560


def test_with_tuning_replaces_only_its_like(policy, tuning):
    before = policy(tuning(1000), tuning(4096))
    after = before.with_tuning(tuning(4000, tau=0.5))
    assert len(after.tunings) == 2
    assert after.find(4096, tuning().options).sites["layers.0.attn"].heads[0].tau == 0.5
    assert len(before.with_tuning(tuning(8192)).tunings) == 3


def test_sites_and_summary(policy, tuning):
    assert policy().sites() == ("layers.0.attn", "layers.1.attn")
    summary = tuning()
    assert summary.density == pytest.approx((0.2 + 0.4 + 1 + 1) / 4)  # a dense site counts as 1
    assert summary.max_error == 0.1
    assert summary.mean_error == pytest.approx(0.075)
    empty = tuning(sites={})
    assert (empty.density, empty.max_error, empty.mean_error) == (None, None, None)


def test_site_needs_heads():
    with pytest.raises(ValueError, match="heads is"):
        Site("a", (), 1, 64, "causal", "sparse")
    with pytest.raises(ValueError, match="decision is 'maybe'"):
        Site("a", (Head("dense", 1.0),), 1, 64, "causal", "maybe")
