"""Each sample once, equally many batches a rank, the same on all of them, and resumed exactly."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.training.sampler import SparsityAwareBatchSampler, totals
from afbs_compile.tuner.densities import DensityEstimates
from afbs_compile.tuner.step_cost import CostModel

worlds, sizes, micros = st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)
syncs, windows = st.sampled_from(["step", "micro"]), st.integers(1, 3)
assigns = st.sampled_from(["lpt", "karmarkar-karp", "deal", "snake"])


@given(st.integers(0, 120), worlds, sizes, micros, syncs, windows, assigns, st.integers(0, 3))
def test_each_sample_once_and_no_rank_idle(
    samplers, long_tail, extra, world, size, micro, sync, window, assign, epoch
):
    samples = world + extra
    made = samplers(
        long_tail(samples), world, size, micro, sync=sync, window=window, assign=assign
    )
    for sampler in made:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in made]
    assert {len(batches) for batches in ranks} == {len(made[0])}
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(np.concatenate(batches)) == list(range(samples))
    assert 1 <= min(map(len, batches)) <= max(map(len, batches)) <= size + 1


@given(st.integers(0, 60), worlds, sizes, micros, windows)
def test_drop_last_leaves_whole_global_batches(
    samplers, long_tail, extra, world, size, micro, window
):
    whole = world * size * micro
    made = samplers(long_tail(whole + extra), world, size, micro, window=window, drop_last=True)
    batches = [batch for sampler in made for batch in sampler]
    assert {len(batch) for batch in batches} == {size}
    samples = np.concatenate(batches)
    assert len(np.unique(samples)) == len(samples) == (whole + extra) // whole * whole


def test_a_tail_smaller_than_the_world_joins_the_batch_before(samplers, long_tail):
    made = samplers(long_tail(4 * 2 + 3), 4, 1, 2)
    assert [len(list(sampler)) for sampler in made] == [2] * 4


def test_too_few_samples_are_refused(samplers):
    with pytest.raises(ValueError, match="3 samples are too few for 4 ranks"):
        samplers([10, 10, 10], 4)
    with pytest.raises(ValueError, match="too few"):
        samplers([10] * 7, 4, 2, drop_last=True)


@given(st.integers(0, 5), st.integers(0, 5))
def test_seed_and_epoch_make_the_order(seed, epoch):
    lengths = np.random.default_rng(0).integers(100, 9000, 64)
    one, other = (
        SparsityAwareBatchSampler(lengths, 2, 2, world=4, rank=1, seed=seed) for _ in range(2)
    )
    first = list(one)
    one.set_epoch(epoch)
    other.set_epoch(epoch)
    assert list(one) == list(other)
    other.set_epoch(epoch + 1)
    assert list(one) != list(other)
    assert epoch or list(one) == first


@given(st.integers(12, 80), worlds, sizes, micros, st.data())
def test_resumption_is_exact_in_the_middle_of_an_epoch(
    long_tail, samples, world, size, micro, data
):
    lengths, rank = long_tail(samples), data.draw(st.integers(0, world - 1))

    def sampler(seed):
        return SparsityAwareBatchSampler(
            lengths, size, micro, world=world, rank=rank, seed=seed,
            densities=DensityEstimates(np.full(samples, 0.5)), cost=CostModel(),
        )  # fmt: skip

    one = sampler(3)
    one.densities.observe(list(range(0, samples, 2)), 0.1)  # not committed before the next epoch
    one.set_epoch(2)
    whole = list(one)
    done = data.draw(st.integers(1, len(whole)))
    iterator = iter(one)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(one.state_dict()))
    assert state["done"] == done
    one.densities.commit()  # what is learned later changes nothing of this epoch
    other = sampler(99)
    other.load_state_dict(state)
    other.set_epoch(2)  # as a training loop does when it starts again
    assert whole[:done] + list(other) == whole
    other.densities.commit()
    for resumed in (one, other):
        resumed.set_epoch(3)
    assert list(one) == list(other)


def test_a_loader_that_reads_ahead_tells_what_it_has_used(long_tail):
    lengths = long_tail(32)
    one, other = (SparsityAwareBatchSampler(lengths, world=2, rank=0) for _ in range(2))
    batches = list(one)  # all handed out, four used
    other.load_state_dict(one.state_dict(done=4))
    assert list(other) == batches[4:]
    assert list(other) == batches  # from the next epoch on everything


def test_another_world_goes_on_with_the_same_global_batches(samplers, long_tail):
    lengths = long_tail(64)
    before = samplers(lengths, 4, 2, 2)
    done = [
        sample for step in range(2) for rank in before[0].step(step) for m in rank for sample in m
    ]
    after = samplers(lengths, 2, 2, 4)
    for sampler in after:
        sampler.load_state_dict(before[0].state_dict(done=4))
    rest = [sample for sampler in after for batch in sampler for sample in batch]
    assert sorted(done + rest) == list(range(64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 2, "rank": 0}, "keep ranks × batch_size"),
        ({"world": 8, "rank": 0, "micro_batches": 1}, "1 of them done in a step"),
        ({"world": 4, "rank": 0, "lengths": [10] * 20}, "40 samples, there are 20"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(options, message):
    state = SparsityAwareBatchSampler([10] * 40, 1, 2, world=4, rank=0).state_dict(done=3)
    wanted = {"lengths": [10] * 40, "micro_batches": 2} | options
    with pytest.raises(ValueError, match=message):
        SparsityAwareBatchSampler(**wanted).load_state_dict(state)


def makespans(sampler):
    return [totals(sampler.step(n), sampler.costs) for n in range(sampler.steps)]


def test_balance_over_ranks(samplers, long_tail):
    lengths = long_tail(512)
    slowest = {
        assign: sum(t.sum(1).max() for t in makespans(
            SparsityAwareBatchSampler(lengths, 1, 8, world=4, rank=0, assign=assign)))
        for assign in ("deal", "snake", "lpt", "karmarkar-karp")
    }  # fmt: skip
    assert slowest["lpt"] < slowest["snake"] < slowest["deal"]
    assert slowest["karmarkar-karp"] < slowest["deal"]


def test_micro_batches_that_wait_for_each_other_are_alike(long_tail):
    lengths = long_tail(512)
    waiting = {
        sync: sum(t.max(0).sum() for t in makespans(
            SparsityAwareBatchSampler(lengths, 1, 8, world=4, rank=0, sync=sync)))
        for sync in ("step", "micro")
    }  # fmt: skip
    assert waiting["micro"] < 0.97 * waiting["step"]


def test_a_window_makes_steps_more_even(long_tail):
    lengths = long_tail(1024)
    slowest = [
        sum(t.sum(1).max() for t in makespans(
            SparsityAwareBatchSampler(lengths, 2, world=8, rank=0, window=window)))
        for window in (1, 8)
    ]  # fmt: skip
    assert slowest[1] < 0.9 * slowest[0]


def test_known_densities_balance_better_than_lengths():
    rng = np.random.default_rng(0)
    lengths, density = rng.integers(20000, 40000, 512), rng.choice([0.05, 0.8], 512)
    known, blind = (
        SparsityAwareBatchSampler(lengths, 1, 4, world=4, rank=0, densities=estimates)
        for estimates in (DensityEstimates(density), None)
    )
    slowest = [
        sum(totals(sampler.step(n), known.costs).sum(1).max() for n in range(known.steps))
        for sampler in (known, blind)
    ]
    assert slowest[0] < 0.9 * slowest[1]


def test_works_as_batch_sampler_of_a_loader(long_tail):
    from torch.utils.data import DataLoader

    sampler = SparsityAwareBatchSampler(long_tail(30), 2, world=2, rank=1)
    loader = DataLoader(list(range(30)), batch_sampler=sampler, collate_fn=list, num_workers=0)
    assert list(loader) == list(sampler)
    assert len(loader) == len(sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "rank is 2 of 2"),
        ({"assign": "best"}, "assign 'best'"),
        ({"window": 0}, "window 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"sync": "never"}, "sync 'never'"),
        ({"lengths": [0, 1]}, "above 0"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SparsityAwareBatchSampler(**({"lengths": [5, 6, 7]} | options))
