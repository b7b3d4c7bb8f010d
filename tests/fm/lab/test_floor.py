"""The floor of a step, against arithmetic by hand; what is counted, in which dtype."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fm.config import LossSettings
from fm.lab.benchmark import KINDS, Ceilings, data_sheet, floor, measure_ceilings
from fm.lab.hardware import GPUS
from fm.lab.plan import Product, footprint
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll

STATS = {key: {"tracer": 1.0} for key in ("mean", "std", "mean_delta", "std_delta")}
SPEC = DatasetSpec("shear_flow", ("tracer",), (), (("PERIODIC", "PERIODIC"),) * 2, STATS)
WIDTH, DEPTH, HEADS, GRID, WINDOWS = 16, 2, 2, (32, 64), 3
CONFIG = ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS, wavelet="haar", pyramid_levels=0, mlp_ratio=4.0)
TOKENS = WINDOWS * GRID[0] * GRID[1] // 4
ROUND = Ceilings({"float32": 1e9, "bfloat16": 4e9}, 1e8, "round numbers")


def counted(autocast: torch.dtype | None) -> list[Product]:
    with FakeTensorMode():
        model = WaveLiTFM(CONFIG, [SPEC])
    return list(footprint(Unroll(model, LossSettings(), autocast=autocast), "shear_flow", GRID, WINDOWS).products)


def flops(products: list[Product], kind: str) -> int:
    return sum(product.flops for product in products if product.kind == kind)


def test_a_product_takes_the_longer_of_arithmetic_and_traffic() -> None:
    products = [
        Product("linear", torch.bfloat16, 8_000_000_000, 100),  # 2 s of arithmetic
        Product("attention", torch.float32, 1_000_000_000, 300_000_000),  # 1 s of arithmetic, 3 s of traffic
        Product("depthwise", torch.float32, 100, 50_000_000),  # 0.5 s of traffic
    ]
    found = floor(products, parameters=1_000_000, ceilings=ROUND)
    optimizer = 13 * 4 * 1e6 / 1e8
    assert (found.linear, found.attention, found.depthwise) == (2.0, 3.0, 0.5)
    assert found.optimizer == pytest.approx(optimizer)
    assert found.seconds == pytest.approx(5.5 + optimizer)
    assert found.traffic == pytest.approx(3.5 + optimizer)


def test_linear_layers_by_hand() -> None:
    """Per block and token: five D x D, query and key D x 2D, an MLP of 2 x D x 4D; backward twice the forward pass.

    Lifting has 4 coefficients in, its input needs no gradient; the head has 4 out.
    """
    block = WIDTH * WIDTH * (4 + 2 + 8)
    ends = 2 * 4 * WIDTH
    lifting_backward = 4 * WIDTH  # of its weights alone
    by_hand = 2 * TOKENS * (3 * DEPTH * block + ends + lifting_backward + 2 * 4 * WIDTH)
    assert flops(counted(None), "linear") == by_hand


def test_depthwise_convolutions_by_hand() -> None:
    """Four a block, nine multiply-adds a token and channel, backward to input and weights."""
    assert flops(counted(None), "depthwise") == 3 * 2 * TOKENS * WIDTH * 9 * 4 * DEPTH


def test_attention_by_hand() -> None:
    """K'V, K'K and Q times the state: three products of N x m x m a head, six more backward, and one of m x m x m.

    The ridge solve substitutes, which is no product, but for the gradient of its matrix.
    """
    m = WIDTH // HEADS
    tokens = 9 * 2 * TOKENS * WIDTH * m * DEPTH
    small = 2 * WINDOWS * HEADS * m**3 * DEPTH
    assert flops(counted(None), "attention") == tokens + small


def test_bytes_of_a_product_are_its_tensors_once() -> None:
    """Of those with 2 x N x D x 4D FLOPs: both layers of the MLP, and the backward pass of query and key."""
    found = [one.bytes for one in counted(None) if one.kind == "linear" and one.flops == 2 * TOKENS * WIDTH * 4 * WIDTH]
    weights = 4 * WIDTH * WIDTH
    expand, contract = (TOKENS * 5 * WIDTH + weights + bias for bias in (4 * WIDTH, WIDTH))
    query_key = TOKENS * (2 + 1 + 1) * WIDTH + weights + 2 * WIDTH
    assert sorted(found) == sorted(4 * numbers for numbers in (expand, contract, query_key) * DEPTH)


def test_under_bf16_attention_stays_float32() -> None:
    products = counted(torch.bfloat16)
    dtypes = {kind: {one.dtype for one in products if one.kind == kind} for kind in KINDS}
    assert dtypes == {"linear": {torch.bfloat16}, "depthwise": {torch.bfloat16}, "attention": {torch.float32}}
    assert {one.dtype for one in counted(None)} == {torch.float32}
    for kind in dtypes:
        assert flops(products, kind) == flops(counted(None), kind)


def test_data_sheets_and_measured_ceilings() -> None:
    h200 = data_sheet(GPUS["h200"])
    assert h200.rate(torch.bfloat16) == 989e12
    assert h200.rate(torch.float32) == 67e12
    assert h200.seconds(989e12, 9600e9, torch.bfloat16) == 2.0
    found = measure_ceilings(torch.device("cpu"))
    assert found.rate(torch.float32) > 1e8
    assert found.flops["bfloat16"] > 1e8
    assert found.bandwidth > 1e8
