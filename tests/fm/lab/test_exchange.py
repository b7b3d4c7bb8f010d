"""The model of the gradients' exchange, against values made by hand."""

import pytest

from fm.lab.hardware import BUCKET, FIRST_BUCKET, HOP_SECONDS, NODE, Interconnect, buckets

MB = 1e6
LINKS = Interconnect(link=100, network=10)  # GB/s


def test_one_node_is_a_ring() -> None:
    assert LINKS.all_reduce(40 * MB, 1) == 0
    # two halves of 20 MB go once each way at 100 GB/s, in two hops
    assert LINKS.all_reduce(40 * MB, 2) == pytest.approx(2 * 20e6 / 100e9 + 2 * HOP_SECONDS)
    # 14 times an eighth of 5 MB
    assert LINKS.all_reduce(40 * MB, NODE) == pytest.approx(14 * (50e-6 + HOP_SECONDS))


def test_nodes_exchange_an_eighth_each_over_the_network() -> None:
    ring = 14 * (50e-6 + HOP_SECONDS)
    # 5 MB a GPU: 2 x 3/4 of it at 10 GB/s among four nodes, 2 x 2 hops of a tree
    assert LINKS.all_reduce(40 * MB, 32) == pytest.approx(ring + 1.5 * 500e-6 + 4 * HOP_SECONDS)
    assert LINKS.all_reduce(40 * MB, 1024) == pytest.approx(ring + 2 * 127 / 128 * 500e-6 + 14 * HOP_SECONDS)
    # a node that is not full counts as a node
    assert LINKS.all_reduce(40 * MB, 9) == LINKS.all_reduce(40 * MB, 16)


def test_bytes_fill_buckets() -> None:
    assert buckets(1000) == [1000]
    assert buckets(FIRST_BUCKET + 2 * BUCKET + 7) == [FIRST_BUCKET, BUCKET, BUCKET, 7]
    assert buckets(FIRST_BUCKET + BUCKET) == [FIRST_BUCKET, BUCKET]
    assert len(buckets(4 * 10_040_316)) == 3  # as DistributedDataParallel makes of the paper's model


def test_a_backward_pass_hides_all_but_the_last_bucket() -> None:
    sizes = [10 * MB, 30 * MB]
    first, second = (LINKS.all_reduce(size, 2) for size in sizes)
    assert LINKS.after_backward(sizes, 1.0, 2) == pytest.approx(second)
    assert LINKS.after_backward(sizes, 0.0, 2) == pytest.approx(first + second)
    # the first is sent from a quarter of the backward pass on, and keeps the second waiting
    backward = first / 2
    assert LINKS.after_backward(sizes, backward, 2) == pytest.approx(0.25 * backward + first + second - backward)
    assert LINKS.after_backward(sizes, 1.0, 1) == 0
