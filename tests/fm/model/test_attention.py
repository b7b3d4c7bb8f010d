"""Linear attention against explicit sums and plain solves; 2D RoPE against rotations by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from fm.model.attention import (
    JITTER,
    LAMBDA_INIT,
    LinearAttention,
    SoftmaxAttention,
    attention_state,
    eliminate,
    feature_map,
    ridge_solve,
    rope_table,
    rotate,
)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_feature_map_is_elu_plus_one() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(feature_map(x), torch.tensor([0.1353353, 1.0, 4.0]))


def test_plain_state_gives_the_quadratic_sum() -> None:
    """o_n = sum_j (q_n . k_j) v_j / N, pair by pair."""
    q, k, v = (tokens(2, 3, 35, 8, seed=i) for i in range(3))
    expected = torch.zeros_like(v)
    for n in range(35):
        for j in range(35):
            weight = (q[:, :, n] * k[:, :, j]).sum(-1, keepdim=True)
            expected[:, :, n] += weight * v[:, :, j] / 35
    torch.testing.assert_close(q @ attention_state(k, v, None), expected, atol=1e-12, rtol=0)


def test_ridge_equals_a_plain_solve() -> None:
    k, v = tokens(2, 3, 50, 8).abs(), tokens(2, 3, 50, 8, seed=1)
    ridge = torch.tensor([0.01, 0.3, 5.0], dtype=torch.float64)
    gram = k.mT @ k / 50
    scale = JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = (ridge + scale)[..., None, None] * torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(gram + shift, k.mT @ v / 50)
    torch.testing.assert_close(attention_state(k, v, ridge), expected, atol=1e-10, rtol=1e-10)
    in_float32 = attention_state(k.float(), v.float(), ridge.float())
    torch.testing.assert_close(in_float32, expected.float(), atol=1e-4, rtol=1e-4)


def test_small_lambda_is_least_squares_and_large_lambda_the_plain_state() -> None:
    k, v = tokens(1, 2, 200, 8), tokens(1, 2, 200, 8, seed=1)
    least_squares = torch.linalg.lstsq(k, v).solution
    torch.testing.assert_close(attention_state(k, v, torch.zeros(2).double()), least_squares, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_state(k, v, torch.full((2,), 1e-9).double()), least_squares, atol=1e-5, rtol=0)
    large = torch.full((2,), 1e7).double()
    torch.testing.assert_close(1e7 * attention_state(k, v, large), attention_state(k, v, None), atol=1e-6, rtol=0)


def test_gradients_of_the_ridge_solve() -> None:
    k = tokens(2, 2, 30, 4)
    gram = (k.mT @ k / 30).requires_grad_()
    s = tokens(2, 2, 4, 4, seed=1).requires_grad_()
    shift = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)

    def symmetric_solve(gram: torch.Tensor, s: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return ridge_solve((gram + gram.mT) / 2, s, shift)  # finite differences must stay on symmetric matrices

    assert torch.autograd.gradcheck(symmetric_solve, (gram, s, shift), atol=1e-5, rtol=1e-4)


def test_elimination_is_the_same_solve() -> None:
    k, v = tokens(2, 3, 40, 8), tokens(2, 3, 40, 5, seed=1)
    gram, s, shift = k.mT @ k / 40, k.mT @ v / 40, torch.tensor([1e-3, 0.1, 10.0], dtype=k.dtype)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    added = shift[:, None] + JITTER * diagonal.mean(-1, keepdim=True)
    expected = torch.linalg.solve(gram + torch.diag_embed(added.expand_as(diagonal)), s)
    torch.testing.assert_close(eliminate(gram, s, shift), expected)
    torch.testing.assert_close(eliminate(gram, s, shift), ridge_solve(gram, s, shift))


def test_rank_deficient_keys_stay_finite() -> None:
    """Fewer tokens than channels, and keys of very different scales, without lambda."""
    for scale in (1e-3, 1.0, 1e3):
        k = scale * tokens(1, 1, 3, 16).float()
        assert torch.isfinite(attention_state(k, tokens(1, 1, 3, 16, seed=1).float(), torch.zeros(1))).all()


@pytest.mark.parametrize("ridge", ["ridge", "none", "scaled", "least_squares"])
def test_layer_follows_the_formulas(ridge: str) -> None:
    torch.manual_seed(0)
    layer = LinearAttention(16, 2, ridge).double()
    z, table = tokens(3, 15, 16), rope_table(3, 5, 8).double()
    q, k = layer.query_key(z).chunk(2, dim=-1)
    q, k = (rotate(feature_map(x).view(3, 15, 2, 8).float(), table.float()).double().transpose(1, 2) for x in (q, k))
    v = z.view(3, 15, 2, 8).transpose(1, 2)
    state = k.mT @ v / 15
    if ridge == "scaled":
        state = state / 8
    elif ridge != "none":
        gram = k.mT @ k / 15
        shift = LAMBDA_INIT * float(ridge == "ridge") + JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        state = torch.linalg.solve(gram + shift[..., None, None] * torch.eye(8), state)
    expected = (q @ state).transpose(1, 2).reshape(3, 15, 16)
    tolerance = 2e-2 if ridge == "least_squares" else 2e-5  # 15 tokens, 8 channels: badly conditioned without lambda
    torch.testing.assert_close(layer(z, table.float()), expected, atol=tolerance, rtol=tolerance)


def test_softmax_attention_weighs_every_pair_of_tokens() -> None:
    torch.manual_seed(0)
    layer, z, table = SoftmaxAttention(16, 2), tokens(3, 15, 16).float(), rope_table(3, 5, 8)
    q, k = (rotate(x.unflatten(-1, (2, 8)), table) for x in layer.query_key(z).chunk(2, dim=-1))
    weights = torch.einsum("bnam,bjam->banj", q, k).div(math.sqrt(8)).softmax(-1)
    expected = torch.einsum("banj,bjam->bnam", weights, z.unflatten(-1, (2, 8))).flatten(-2)
    torch.testing.assert_close(layer(z, table), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(z.bfloat16(), table).dtype == torch.bfloat16


def test_scaled_attention_starts_at_the_scale_of_ridge_and_plain_attention_far_above() -> None:
    """So that an ablation of the ridge does not measure the scale."""
    torch.manual_seed(0)
    z, table = F.silu(tokens(2, 256, 64).float()), rope_table(16, 16, 32)
    rms = {}
    for ridge in ("ridge", "none", "scaled"):
        layer = LinearAttention(64, 2, ridge)
        torch.nn.init.normal_(layer.query_key.weight, std=1 / 8, generator=torch.Generator().manual_seed(0))
        rms[ridge] = layer(z, table).square().mean().sqrt().item()
    assert rms["none"] > 8 * rms["ridge"]
    assert 0.5 < rms["scaled"] / rms["ridge"] < 2


def test_solve_is_a_float32_island_under_autocast() -> None:
    torch.manual_seed(0)
    layer, z, table = LinearAttention(16, 2), tokens(2, 20, 16).float(), rope_table(4, 5, 8)
    expected = layer(z, table)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(z, table)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()  # only the linear map is bfloat16
    assert layer.bfloat16()(z.bfloat16(), table).dtype == torch.bfloat16


def test_lambda_is_learned_per_head() -> None:
    layer = LinearAttention(16, 2)
    ridge = layer.ridge_lambda()
    assert ridge is not None
    assert ridge.tolist() == pytest.approx([LAMBDA_INIT] * 2)
    layer(tokens(1, 20, 16).float(), rope_table(4, 5, 8)).square().sum().backward()
    assert layer.log_lambda.grad is not None
    assert layer.log_lambda.grad.abs().min() > 0


def test_unknown_ridge_mode() -> None:
    with pytest.raises(ValueError, match="unknown ridge mode 'lasso': choose one of ridge, none, least_squares, sc"):
        LinearAttention(16, 2, "lasso")


def test_each_pair_turns_by_its_own_angle_anticlockwise() -> None:
    height, width, head_width = 3, 5, 8
    x = torch.randn(1, height * width, 2, head_width, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope_table(height, width, head_width))
    for index_x, index_y in [(0, 0), (2, 1), (1, 4)]:
        token = index_x * width + index_y
        angles = [index_x * 1.0, index_x * 10_000**-0.5, index_y * 1.0, index_y * 10_000**-0.5]
        for head in range(2):
            for pair, angle in enumerate(angles):
                a, b = x[0, token, head, 2 * pair : 2 * pair + 2].tolist()
                expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
                got = turned[0, token, head, 2 * pair : 2 * pair + 2].tolist()
                assert got == pytest.approx(expected, abs=1e-6)


def test_products_depend_on_relative_position_only() -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = rope_table(9, 11, 16).double()

    def product(first: tuple[int, int], second: tuple[int, int]) -> float:
        tokens = [x * 11 + y for x, y in (first, second)]
        turned = [rotate(v.view(1, 1, 1, 16), table[t : t + 1]).flatten() for v, t in zip((q, k), tokens, strict=True)]
        return float(turned[0] @ turned[1])

    assert product((1, 2), (3, 7)) == pytest.approx(product((5, 4), (7, 9)), abs=1e-6)
    assert product((1, 2), (3, 7)) != pytest.approx(product((1, 2), (7, 3)), abs=1e-3)


def test_compiled_form_equals_complex_form() -> None:
    x, table = torch.randn(2, 12, 3, 8), rope_table(3, 4, 8)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table))


def test_head_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        rope_table(4, 4, 6)


def test_tables_are_kept_and_hold_neither_fake_nor_inference_tensors() -> None:
    with FakeTensorMode():
        assert isinstance(rope_table(6, 10, 8), FakeTensor)
    with torch.inference_mode():
        kept = rope_table(6, 10, 8)
    assert type(kept) is Tensor
    assert not kept.is_inference()
    x = torch.randn(1, 60, 1, 8, requires_grad=True)
    rotate(x, rope_table(6, 10, 8)).sum().backward()  # an inference tensor would not do
    assert rope_table(6, 10, 8) is kept
    assert rope_table(10, 6, 8) is not kept
    with FakeTensorMode():
        assert isinstance(rope_table(6, 10, 8), FakeTensor)  # of the mode, whatever is kept
    traced = torch.compile(lambda x: x + rope_table(6, 10, 8), backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.zeros(())), kept)
