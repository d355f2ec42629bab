"""Scalars reach everybody, peers of a replica count as one, and what is missing stays missing."""

import math

import numpy as np
import pytest
import torch.multiprocessing as mp

from afbs_compile.training.exchange import ScalarExchange


def test_alone_there_is_one_replica():
    exchange = ScalarExchange()
    assert exchange.finish() is None
    exchange.start(2.5)
    assert exchange.finish().tolist() == [2.5]
    assert exchange.finish() is None
    assert exchange.total(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_replicas_need_ranks():
    with pytest.raises(ValueError, match="every number from 0 on"):
        ScalarExchange([1])
    with pytest.raises(ValueError, match="for 1 ranks"):
        ScalarExchange([0, 1])


def peers(rank, port, queue):
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    exchange = ScalarExchange([0, 0, 1, 2])
    exchange.start([1.0, 3.0, math.nan, 2.0][rank])
    found = exchange.finish()
    total = exchange.total(np.full(2, float(rank)))
    queue.put((rank, exchange.replica, found.tolist(), total.tolist()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_peers_decide_on_the_same_numbers(free_port):
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=peers, args=(r, free_port, queue)) for r in range(4)]
    for worker in workers:
        worker.start()
    answers = sorted(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert [replica for _, replica, _, _ in answers] == [0, 0, 1, 2]
    for _, _, found, total in answers:
        np.testing.assert_array_equal(found, [3.0, np.nan, 2.0])
        assert total == [6.0, 6.0]
