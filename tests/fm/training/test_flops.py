"""FLOPs that are counted without computing, against hand arithmetic and against what torch really does."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fm.config import FinetuneSettings, LossSettings
from fm.model.spec import PRESETS, DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.flops import forward_flops, forward_passes, held_calls
from fm.training.objective import Unroll

STATS = {key: {"tracer": 1.0} for key in ("mean", "std", "mean_delta", "std_delta")}
PERIODIC = ("PERIODIC", "PERIODIC")
SPEC = DatasetSpec("shear_flow", ("tracer",), (), (PERIODIC, PERIODIC), STATS)
CONFIG = ModelConfig(width=16, depth=2, heads=2, wavelet="haar", pyramid_levels=0)
# without depthwise convolutions, whose backward pass torch counts as if they were dense
PRODUCTS = replace(CONFIG, cpe=False, lepe=False, mila=False)
GRID = (32, 48)


def model(config: ModelConfig = CONFIG) -> WaveLiTFM:
    return WaveLiTFM(config, [SPEC])


def fake(config: ModelConfig = CONFIG) -> WaveLiTFM:
    with FakeTensorMode():
        return model(config)


def real_pass(objective: Unroll, windows: int, calls: int) -> torch.Tensor:
    fields = torch.randn(windows, calls + 1, 1, *GRID)
    coins = torch.ones(windows, calls, dtype=torch.bool)
    return objective(fields, torch.zeros(windows, 0, *GRID), coins, "shear_flow")["loss"]


def finetune(objective: str, **settings: int) -> FinetuneSettings:
    return FinetuneSettings("nowhere", objective=objective, **settings)  # type: ignore[arg-type]


def test_flops_are_those_of_a_real_forward_pass_for_real_and_fake_models() -> None:
    whole = model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole(torch.randn(1, 1, *GRID), torch.zeros(1, 0, *GRID), "shear_flow")
    assert forward_flops(whole, "shear_flow", GRID) == counter.get_total_flops()
    assert forward_flops(fake(), "shear_flow", GRID) == counter.get_total_flops()
    assert all(type(parameter) is torch.nn.Parameter for parameter in whole.parameters())


def test_flops_of_a_model_by_hand() -> None:
    """All products of a model without depthwise convolutions, multiply-adds a token for N = 384 and D = 16.

    A block of 2 heads of K = 8: input, gate and output D^2 each, query and key 2 D^2, the MLP 2 x 4 D^2, and for
    k^T v, k^T k and q times the state D K each. Outside the blocks: 4 subbands to D and back, 4 D each.
    """
    tokens, width, head = 32 * 48 // 4, 16, 8
    block = 13 * width**2 + 3 * width * head
    assert 2 * tokens * (2 * block + 8 * width) == 5_799_936
    assert forward_flops(fake(PRODUCTS), "shear_flow", GRID) == 5_799_936


def test_flops_of_a_wider_hidden_layer_by_hand() -> None:
    """An MLP of ratio r has 2 x D x rD multiply-adds a token and block."""
    narrow, wide = (replace(CONFIG, mlp_ratio=ratio) for ratio in (2.0, 4.0))
    more = forward_flops(fake(wide), "shear_flow", GRID) - forward_flops(fake(narrow), "shear_flow", GRID)
    tokens, width = GRID[0] * GRID[1] // 4, CONFIG.width
    assert more == 2 * CONFIG.depth * tokens * 2 * width * (2 * width)


def test_products_that_stay_float32_under_bfloat16_are_a_thousandth() -> None:
    """Embedding and head of the 9.5M model, for a dataset of four channels, as most of the eight have."""
    names, size = ("a", "b", "c", "d"), PRESETS["9.5M"]
    stats = {key: dict.fromkeys(names, 1.0) for key in STATS}
    with FakeTensorMode():
        one = WaveLiTFM(replace(size, depth=1), [DatasetSpec("shear_flow", names, (), (PERIODIC, PERIODIC), stats)])
    exact = 2 * 2 * (GRID[0] * GRID[1] // 4) * size.width * size.subbands * len(names)
    blocks = size.depth * (forward_flops(one, "shear_flow", GRID) - exact)
    assert 0.0005 < exact / (exact + blocks) < 0.001


def test_flops_of_softmax_attention_grow_as_the_square_of_tokens() -> None:
    softmax, linear = replace(PRODUCTS, ridge="none", attention="softmax"), replace(PRODUCTS, ridge="none")
    extra = []
    for height in (32, 64):
        counts = [forward_flops(model(one), "shear_flow", (height, 48)) for one in (softmax, linear)]
        tokens = height * 48 // 4
        # q k^T and its product with v, in place of k^T v and its product with q
        extra.append(counts[0] - counts[1] - CONFIG.depth * 2 * 2 * CONFIG.width * (tokens**2 - tokens * 8))
    assert extra == [0, 0]


def test_flops_grow_as_tokens() -> None:
    small, large = (forward_flops(fake(), "shear_flow", grid) for grid in (GRID, (128, 192)))
    assert large / small == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "calls", "passes", "held"),
    [
        (None, 1, 3, 1),
        (finetune("scheduled_sampling"), 4, 12, 4),
        (finetune("bptt"), 4, 12, 4),
        (finetune("pushforward"), 4, 6, 1),
        (finetune("bptt", checkpoint_activations=True), 4, 16, 1),
        (finetune("pushforward", checkpoint_activations=True), 4, 7, 1),
    ],
)
def test_passes_of_each_objective(settings: FinetuneSettings | None, calls: int, passes: int, held: int) -> None:
    assert (forward_passes(calls, settings), held_calls(calls, settings)) == (passes, held)
    objective = Unroll(model(PRODUCTS), LossSettings(), settings)
    with FlopCounterMode(display=False) as counter:
        real_pass(objective, 2, calls).backward()
    forward = 2 * forward_flops(objective.model, "shear_flow", GRID)
    assert counter.get_total_flops() / forward == pytest.approx(passes, rel=0.1)
