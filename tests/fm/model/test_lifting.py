"""ChannelEmbedding by canonical channel, and the head."""

import torch

from fm.model.wavelit import ChannelEmbedding, Head


def random_lifting() -> ChannelEmbedding:
    torch.manual_seed(0)
    lifting = ChannelEmbedding(["density", "A", "velocity_x", "mask", "pressure"], subbands=4, width=12)
    for parameter in lifting.parameters():
        torch.nn.init.normal_(parameter)
    return lifting


def test_gathering_equals_padding_absent_channels_with_zeros() -> None:
    lifting = random_lifting().double()
    every = list(lifting.rows)
    present = ["velocity_x", "density"]
    coefficients = torch.randn(2, 2, 4, 8, 10, dtype=torch.float64)
    padded = torch.zeros(2, len(every), 4, 8, 10, dtype=torch.float64)
    for i, name in enumerate(present):
        padded[:, every.index(name)] = coefficients[:, i]
    torch.testing.assert_close(lifting(coefficients, present), lifting(padded, every), atol=1e-13, rtol=0)


def test_lifting_is_the_double_sum() -> None:
    lifting = random_lifting()
    coefficients = torch.randn(1, 2, 4, 3, 5)
    expected = torch.zeros(1, 3, 5, 12)
    for c, name in enumerate(["mask", "A"]):
        for s in range(4):
            expected += coefficients[:, c, s, :, :, None] * lifting.rows[name][s]
    torch.testing.assert_close(lifting(coefficients, ["mask", "A"]), expected, atol=1e-5, rtol=1e-5)


def test_an_absent_channel_changes_no_bit_and_gets_no_gradient() -> None:
    lifting = random_lifting()
    coefficients = torch.randn(2, 2, 4, 8, 10)
    before = lifting(coefficients, ["density", "A"])
    before.square().sum().backward()
    assert lifting.rows["mask"].grad is None
    assert lifting.rows["A"].grad is not None
    with torch.no_grad():
        lifting.rows["mask"].fill_(float("nan"))
    assert torch.equal(lifting(coefficients, ["density", "A"]), before)


def test_head_gives_each_channel_its_subbands() -> None:
    head = Head(width=6, channels=3, subbands=4)
    torch.nn.init.normal_(head.linear.weight)
    x = torch.randn(2, 5, 7, 6)
    coefficients = head(x)
    assert coefficients.shape == (2, 3, 4, 5, 7)
    row = head.linear.weight[2 * 4 + 1]
    torch.testing.assert_close(coefficients[:, 2, 1], x @ row + head.linear.bias[9], atol=1e-5, rtol=1e-5)
