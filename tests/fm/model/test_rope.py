"""2D RoPE against rotations by hand, sign included, and its relative-position law."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fm.model.attention import rope_table, rotate


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
