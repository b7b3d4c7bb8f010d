"""What a step computes, moves and keeps, against arithmetic by hand and against what torch really does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fm.config import LossSettings
from fm.lab.workload import Product, footprint
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll

STATS = {key: {"tracer": 1.0} for key in ("mean", "std", "mean_delta", "std_delta")}
SPEC = DatasetSpec("shear_flow", ("tracer",), (), (("PERIODIC", "PERIODIC"),) * 2, STATS)
WIDTH, DEPTH, HEADS, GRID, WINDOWS = 16, 2, 2, (32, 64), 3
CONFIG = ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS, wavelet="haar", pyramid_levels=0, mlp_ratio=4.0)
TOKENS = WINDOWS * GRID[0] * GRID[1] // 4


def fake_objective(autocast: torch.dtype | None = None, context: int = 1) -> Unroll:
    with FakeTensorMode():
        model = WaveLiTFM(CONFIG, [SPEC], context=context)
    return Unroll(model, LossSettings(), autocast=autocast)


def counted(autocast: torch.dtype | None) -> list[Product]:
    return list(footprint(fake_objective(autocast), "shear_flow", GRID, WINDOWS).products)


def flops(products: list[Product], kind: str) -> int:
    return sum(product.flops for product in products if product.kind == kind)


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


def test_under_bf16_attention_embedding_and_head_stay_float32() -> None:
    products = counted(torch.bfloat16)
    dtypes = {
        kind: {one.dtype for one in products if one.kind == kind} for kind in ("linear", "attention", "depthwise")
    }
    both = {torch.bfloat16, torch.float32}  # in float32: embedding and head
    assert dtypes == {"linear": both, "depthwise": {torch.bfloat16}, "attention": {torch.float32}}
    assert {one.dtype for one in counted(None)} == {torch.float32}
    for kind in dtypes:
        assert flops(products, kind) == flops(counted(None), kind)


@pytest.mark.parametrize(("windows", "calls"), [(1, 1), (2, 1), (2, 3)])
def test_kept_bytes_are_what_autograd_saves(windows: int, calls: int) -> None:
    objective = Unroll(WaveLiTFM(CONFIG, [SPEC]), LossSettings())
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*objective.model.parameters(), *objective.model.buffers())
    }
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fields = torch.randn(windows, calls + 1, 1, *GRID)
        objective(fields, torch.zeros(windows, 0, *GRID), torch.ones(windows, calls, dtype=torch.bool), "shear_flow")
    really = sum(storage.nbytes() for storage in saved.values())
    counted = footprint(fake_objective(), "shear_flow", GRID, windows, calls).kept_bytes
    assert counted == pytest.approx(really, rel=0.01)


def test_model_steps_keep_alike_and_bf16_less() -> None:
    one, four = (footprint(fake_objective(), "shear_flow", GRID, 2, calls).kept_bytes for calls in (1, 4))
    assert four / one == pytest.approx(4, rel=0.1)
    halved = footprint(fake_objective(torch.bfloat16), "shear_flow", GRID, 2).kept_bytes
    assert 0.5 * one < halved < 0.9 * one


def test_each_frame_more_is_lifted_in_each_model_step() -> None:
    """Forward, and backward to the weights alone. The input of a second step, a prediction, needs a gradient too."""

    def linear(context: int, calls: int) -> int:
        found = footprint(fake_objective(context=context), "shear_flow", GRID, WINDOWS, calls)
        return flops(list(found.products), "linear")

    rows = 2 * TOKENS * 4 * WIDTH  # of one frame's coefficients
    assert linear(2, 1) - linear(1, 1) == 2 * rows
    assert linear(1, 2) - linear(1, 1) == linear(1, 1) + rows


def test_a_footprint_moves_more_than_it_keeps_and_leaves_no_gradient() -> None:
    objective = fake_objective()
    found = footprint(objective, "shear_flow", GRID)
    assert found.moved_bytes > found.kept_bytes
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    larger = footprint(objective, "shear_flow", (64, 128))
    assert larger.moved_bytes / found.moved_bytes == pytest.approx(4, rel=0.1)
    assert larger.operations == pytest.approx(found.operations, rel=0.01)
