"""Data sheets, measured ceilings, the roofline, and the exchange of gradients, against values by hand."""

import pytest
import torch

from fm.lab.hardware import (
    BUCKET,
    FIRST_BUCKET,
    GPUS,
    HOP_SECONDS,
    NODE,
    PARTS,
    AssumedSpeed,
    Ceilings,
    Interconnect,
    buckets,
    data_sheet,
    measure_ceilings,
    roofline,
)
from fm.lab.workload import Product

ROUND = Ceilings({"float32": 1e9, "bfloat16": 4e9}, 1e8, "round numbers")
MB = 1e6
LINKS = Interconnect(link=100, network=10)  # GB/s


def test_an_assumed_speed_adds_arithmetic_and_traffic() -> None:
    speed = AssumedSpeed(GPUS["h200"], 0.5, bf16=True)
    assert speed.seconds(989e12, 0, 0) == pytest.approx(2.0)
    assert speed.seconds(0, 4800e9, 0) == pytest.approx(1.0)
    assert speed.seconds(989e12, 4800e9, 10) == pytest.approx(3.0)
    assert speed.seconds(0, 1, 1_000_000) == pytest.approx(5.0)
    assert AssumedSpeed(GPUS["h100"], 1.0, bf16=False).flops == 67e12


def test_a_product_takes_the_longer_of_arithmetic_and_traffic() -> None:
    products = [
        Product("linear", torch.bfloat16, 8_000_000_000, 100),  # 2 s of arithmetic
        Product("attention", torch.float32, 1_000_000_000, 300_000_000),  # 1 s of arithmetic, 3 s of traffic
        Product("depthwise", torch.float32, 100, 50_000_000),  # 0.5 s of traffic
    ]
    found = roofline(products, parameters=1_000_000, ceilings=ROUND)
    optimizer = 13 * 4 * 1e6 / 1e8
    assert (found["linear"], found["attention"], found["depthwise"]) == (2.0, 3.0, 0.5)
    assert found["optimizer"] == pytest.approx(optimizer)
    assert sum(found[part] for part in PARTS) == pytest.approx(5.5 + optimizer)
    assert found["traffic"] == pytest.approx(3.5 + optimizer)


def test_data_sheets_and_measured_ceilings() -> None:
    h200 = data_sheet(GPUS["h200"])
    assert h200.rate(torch.bfloat16) == 989e12
    assert h200.rate(torch.float32) == 67e12
    assert h200.seconds(989e12, 9600e9, torch.bfloat16) == 2.0
    found = measure_ceilings(torch.device("cpu"))
    assert found.rate(torch.float32) > 1e8
    assert found.flops["bfloat16"] > 1e8
    assert found.bandwidth > 1e8


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
