"""Baselines: they train on every grid, channels stay apart, files name their kind; the WNO against PyWavelets."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from accelerate import Accelerator
from handmade import STATE_CHANNELS, make_inputs, make_spec
from whole_runs import last_weights, log

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.config import LossSettings, Recipe, TrainSettings, load_recipe, resolve
from fm.datasets import new_model
from fm.model.baselines import SIZES, UNUSED, WNO, Baseline, BaselineConfig, WaveletMixing, upstream_class
from fm.model.loss import wavelit_loss
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll
from fm.training.state import spread
from fm.training.trainer import train

SMALL: dict[str, dict[str, int]] = {
    "unet_convnext": {"init_features": 4, "stages": 3},
    "unet_classic": {"init_features": 4},
    "fno": {"modes1": 8, "modes2": 8, "hidden_channels": 4},
    "tfno": {"modes1": 8, "modes2": 8, "hidden_channels": 4},
    "avit": {"hidden_dim": 48, "num_heads": 4, "processor_blocks": 1},
    "wno": {"width": 8, "depth": 2, "levels": 3},
}
PACKAGES = {"wno": "ptwt", "fno": "tltorch", "tfno": "tltorch"}  # that a baseline needs; the others huggingface_hub
NAMES = ["acoustic_scattering_maze", "active_matter", "rayleigh_benard"]


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES.get(request.param, "huggingface_hub"), reason="needs the extra baselines")
    return request.param


def small(name: str, *datasets: str, seed: int = 0, **options: Any) -> Baseline:
    config = BaselineConfig(name, SMALL[name], **options)
    return Baseline(config, [make_spec(dataset) for dataset in datasets or NAMES], seed)


def test_trains_on_every_tiny_grid(name: str, tiny_shards: Path) -> None:
    readers = open_readers(tiny_shards, None, "train", verify=False)
    model = small(name, *STATE_CHANNELS)
    grids = set()
    for dataset, reader in readers.items():
        grid = tuple(reader.manifest.grid)
        grids.add(grid)
        state, constants = make_inputs(model.specs[dataset], *grid)
        prediction = model(state, constants, dataset)
        assert prediction.shape == state.shape
        assert prediction.dtype == torch.float32
        model.zero_grad()
        wavelit_loss(prediction, torch.zeros_like(state), model.residual_scale(dataset)).total.sum().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        idle = [key for key, gradient in gradients.items() if gradient is None]
        assert all(key.endswith("resample.block.0.bias") for key in idle)  # of UNetConvNext's norms, which ignore it
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    assert len(readers) == 8
    assert len(grids) > 2


def test_grids_that_no_power_of_two_divides(name: str) -> None:
    model = small(name)
    for grid in ((18, 22), (16, 46), (50, 34)):
        state, constants = make_inputs(model.specs["rayleigh_benard"], *grid)
        assert torch.isfinite(model(state, constants, "rayleigh_benard")).all()


def first_weight(model: Baseline) -> torch.nn.Parameter:
    """The weight that reads the joint input: (out, in, ...)."""
    total = len(model.slots) + len(model.specs)
    return next(p for p in model.network.parameters() if p.ndim >= 3 and p.shape[1] == total)


def test_absent_channels_and_other_datasets_are_zero_and_change_nothing(name: str) -> None:
    model = small(name)
    state, constants = make_inputs(model.specs["rayleigh_benard"])
    before = model(state, constants, "rayleigh_benard")
    before.square().sum().backward()
    weight = first_weight(model)
    read = [*model.slots, *model.specs]
    used = [i for i, c in enumerate(read) if c in {*model.specs["rayleigh_benard"].state_channels, "rayleigh_benard"}]
    absent = [i for i in range(len(read)) if i not in used]
    assert len(used) == 5
    assert weight.grad is not None
    assert (weight.grad[:, absent] == 0).all()
    assert all(weight.grad[:, i].abs().max() > 0 for i in used)
    with torch.no_grad():
        weight[:, absent] = 1e6
    torch.testing.assert_close(model(state, constants, "rayleigh_benard"), before)


def test_each_channel_dataset_and_constant_has_its_own_slot() -> None:
    model = small("wno")
    name = "acoustic_scattering_maze"
    state, constants = make_inputs(model.specs[name], 16, 16)
    x = model._joint_input(model.inputs(state[:, None], constants, name), model.specs[name])
    slots = dict(zip([*model.slots, *model.specs], x.unbind(1), strict=True))
    assert torch.equal(slots["pressure"], state[:, 0])
    assert torch.equal(slots["speed_of_sound"], constants[:, 1])
    assert (slots[name] == 1).all()
    used = {*model.specs[name].state_channels, *model.specs[name].constant_channels, name}
    assert all((slots[channel] == 0).all() for channel in slots.keys() - used)
    assert "density" not in model.outputs  # a constant here: read, never predicted
    assert not torch.allclose(model(state, constants, name), model(state, constants + 1, name))


def test_what_comes_out_has_the_units_of_wavelits_heads() -> None:
    delta, plain = small("wno", "shear_flow"), small("wno", "shear_flow", predict="state")
    state, constants = make_inputs(delta.specs["shear_flow"])
    reference = WaveLiTFM(ModelConfig(width=16, depth=1, heads=2), [make_spec("shear_flow")])
    change = delta(state, constants, "shear_flow") - reference(state, constants, "shear_flow")  # heads start at zero
    output = plain(state, constants, "shear_flow")
    torch.testing.assert_close(change, output / reference.residual_scale("shear_flow"), atol=1e-5, rtol=1e-4)


def test_periodic_sides_are_extended_by_the_other_end_and_others_by_their_last_value() -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra baselines")
    model = small("unet_convnext")
    state, constants = make_inputs(model.specs["rayleigh_benard"], 18, 22)  # periodic in x alone
    rows = torch.arange(24) % 18
    columns = torch.arange(24).clamp_max(21)
    longer = state[:, :, rows][..., columns]
    expected = model(longer, constants.new_zeros(2, 0, 24, 24), "rayleigh_benard")[..., :18, :22]
    torch.testing.assert_close(model(state, constants, "rayleigh_benard"), expected)


def test_bfloat16_autocast_works_and_returns_float32(name: str) -> None:
    model = small(name, predict="state")
    state, constants = make_inputs(model.specs["rayleigh_benard"], 32, 32)
    expected = model(state, constants, "rayleigh_benard")
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(state, constants, "rayleigh_benard")
    assert prediction.dtype == torch.float32
    error = (prediction - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05
    prediction.sum().backward()


def test_predictions_do_not_depend_on_the_batch(name: str) -> None:
    """Which a batch norm in training would do; and there is nothing that weights and their average do not hold."""
    model = small(name)
    state, constants = make_inputs(model.specs["rayleigh_benard"], 32, 32)
    whole = model(state, constants, "rayleigh_benard")
    torch.testing.assert_close(model(state[:1], constants[:1], "rayleigh_benard"), whole[:1], atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_the_seed_draws_the_weights_and_leaves_torchs_generator_alone(name: str) -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    models = [small(name, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), first)
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert any(not torch.equal(value, models[2][key]) for key, value in models[0].items())


def test_saved_and_loaded_baselines_agree(name: str, tmp_path: Path) -> None:
    model = small(name, seed=3)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["baseline"] == name
    assert description["config"]["sizes"] == {**SIZES[name], **SMALL[name]}
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, Baseline)
    assert loaded.config == model.config
    state, constants = make_inputs(model.specs["active_matter"])
    assert torch.equal(loaded(state, constants, "active_matter"), model(state, constants, "active_matter"))


def test_a_baseline_is_not_a_wavelit_nor_of_other_sizes(tmp_path: Path) -> None:
    small("wno").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.json is of the baseline 'wno', not of a WaveLiT"):
        WaveLiTFM.from_pretrained(tmp_path)
    wide = Baseline(BaselineConfig("wno", {"width": 12}), [make_spec(name) for name in NAMES])
    with pytest.raises(ValueError, match=r"does not fit the model \(wno, width 12, depth 4, levels 4\): "):
        wide.load_weights(tmp_path / "model.safetensors")
    description = small("wno").description()
    for change, message in (
        ({"config": {"name": "wno"}}, r"missing keys \['predict', 'sizes', 'wavelet'\]"),
        (
            {"baseline": "gno", "config": {**description["config"], "name": "gno"}},
            r"config of .*: name: Input should be 'unet.*got 'gno'",
        ),
        ({"extra": 1}, r"unexpected keys \['extra'\]"),
    ):
        (tmp_path / "model.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path)


def test_adapting_keeps_all_datasets_and_refuses_others() -> None:
    model = small("wno", seed=2)
    adapted = model.adapted_to([make_spec("rayleigh_benard")])
    assert list(adapted.specs) == NAMES
    state, constants = make_inputs(model.specs["rayleigh_benard"])
    assert torch.equal(adapted(state, constants, "rayleigh_benard"), model(state, constants, "rayleigh_benard"))
    with pytest.raises(ValueError, match="none for shear_flow: train one on all of them"):
        model.adapted_to([make_spec("rayleigh_benard"), make_spec("shear_flow")])
    other = dataclasses.replace(make_spec("shear_flow"), name="rayleigh_benard")
    with pytest.raises(ValueError, match="dataset rayleigh_benard: the model has the channels"):
        model.adapted_to([other])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {}, "name\n  Input should be 'unet_convnext', 'unet_classic', 'fno', 'tfno', 'avit' or 'wno'"),
        ("fno", {"sizes": {"modes": 8}}, "fno has the sizes modes1, modes2, hidden_channels, got 'modes'"),
        ("wno", {"sizes": {"depth": 0}}, "sizes.depth\n  Input should be greater than 0"),
        ("avit", {"sizes": {"hidden_dim": 64}}, "hidden_dim of avit must be a multiple of 48 and of num_heads, got 64"),
        ("avit", {"sizes": {"hidden_dim": 48, "num_heads": 5}}, "got 48 with 5 heads"),
        ("wno", {"wavelet": "db4"}, "wavelet\n  Input should be 'haar', 'bior2.2' or 'bior4.4'"),
        ("wno", {"predict": "both"}, "predict\n  Input should be 'delta' or 'state'"),
    ],
)
def test_impossible_configurations_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        BaselineConfig(name=name, **options)
    assert message in str(caught.value)


def test_a_recipe_holds_a_model_or_a_baseline() -> None:
    document = {"run": {"name": "x"}, "data": {"shards": "nowhere"}, "train": {"steps": 1}}
    wno = {"name": "wno", "sizes": {"width": 8}}
    recipe = resolve({**document, "baseline": wno}, "here")
    assert recipe.baseline == BaselineConfig("wno", {"width": 8})
    with pytest.raises(UserError, match="model and baseline: expected one of the two sections, got both"):
        resolve({**document, "baseline": wno, "model": {"width": 32}}, "here")
    with pytest.raises(UserError, match=r"unknown key baseline\.nome .* did you mean baseline\.name\?"):
        resolve({**document, "baseline": {"nome": "wno"}}, "here")
    with pytest.raises(UserError, match="wno has the sizes width, depth, levels, got 'widht'"):
        resolve({**document, "baseline": {"name": "wno", "sizes": {"widht": 8}}}, "here")


def test_a_run_learns_resumes_bit_for_bit_and_is_finetuned(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    document = {
        "data": {"shards": str(tiny_shards), "datasets": ["helmholtz_staircase", "rayleigh_benard"], "workers": 0},
        "baseline": {"name": name, "sizes": SMALL[name]},
        "train": {"steps": 16, "learning_rate": 4e-3, "warmup_steps": 2, "ema": 0.9},
        "checkpoint": {"every": 8},
        "validation": {"every": 0},
        "tracking": {"progress": False},
    }

    def run(directory: str, **sections: dict[str, Any]) -> None:
        changed = {key: {**document.get(key, {}), **value} for key, value in sections.items()}
        assert (
            train(resolve({**document, **changed, "run": {**changed["run"], "dir": str(tmp_path / directory)}}, "test"))
            == 0
        )

    run("whole", run={"name": "whole"})
    losses = [line["loss"] for line in log(tmp_path / "whole")]
    assert all(math.isfinite(loss) for loss in losses)
    again = load_recipe(tmp_path / "whole" / "recipe.yaml")
    assert again.model is None
    assert again.baseline == BaselineConfig(name, SMALL[name])
    run("split", run={"name": "split", "stop_at": 8})
    run("split", run={"name": "split"})
    assert last_weights(tmp_path / "split") == last_weights(tmp_path / "whole")
    finetune = {"pretrained": str(tmp_path / "whole"), "unroll_steps": 2}
    changed = {key: value for key, value in document.items() if key != "baseline"}
    recipe = resolve(
        {**changed, "run": {"name": "tuned", "dir": str(tmp_path / "tuned")}, "finetune": finetune,
         "train": {**document["train"], "steps": 2}}, "test")  # fmt: skip
    assert train(recipe) == 0
    assert isinstance(load_pretrained(tmp_path / "tuned"), Baseline)
    other = dataclasses.replace(recipe, baseline=BaselineConfig("wno", {"width": 4}))
    with pytest.raises(UserError, match="the recipe's architecture is not that of"):
        train(dataclasses.replace(other, run=dataclasses.replace(recipe.run, dir=str(tmp_path / "other"))))


@pytest.mark.parametrize("launched", ["FSDP", "DEEPSPEED"])
def test_a_baseline_is_not_sharded(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    objective = Unroll(small("wno"), LossSettings())
    with pytest.raises(UserError, match=r"baselines train in one process or under DDP .* asks for FSDP or DeepSpeed"):
        spread(Accelerator(cpu=True), objective, TrainSettings(steps=1))


@pytest.mark.parametrize(
    ("grid", "levels"), [((64, 64), 3), ((64, 32), 2), ((16, 48), 1), ((18, 22), 1), ((34, 50), 2)]
)
def test_mixes_the_coarsest_subbands_and_keeps_the_finer(grid: tuple[int, int], levels: int) -> None:
    """Levels are three, or as many as the smaller side has room for."""
    torch.manual_seed(0)
    mixing = WaveletMixing(3, levels=3)
    v = torch.randn(2, 3, *grid)
    approximation, coarsest, *finer = pywt.wavedec2(v.numpy(), "db4", mode="symmetric", level=levels)
    weights = mixing.weights.detach().numpy()
    mixed = [np.einsum("bihw,io->bohw", part, weights[i]) for i, part in enumerate((approximation, *coarsest))]
    expected = pywt.waverec2([mixed[0], tuple(mixed[1:]), *finer], "db4", mode="symmetric")[..., : grid[0], : grid[1]]
    torch.testing.assert_close(mixing(v), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_one_set_of_weights_serves_every_grid() -> None:
    torch.manual_seed(0)
    model = WNO(5, 2, width=6, depth=2, levels=3)
    for grid in ((16, 16), (64, 32), (18, 46)):
        output = model(torch.randn(2, 5, *grid))
        assert output.shape == (2, 2, *grid)
        output.sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_model_is_upstreams_and_its_import_leaves_no_stand_in() -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra baselines")
    before = {name: sys.modules.get(name) for name in (*UNUSED, "the_well.benchmark.models", "neuralop")}
    network = upstream_class("unet_classic", "UNetClassic")
    assert network.__module__ == "the_well.benchmark.models.unet_classic"
    assert upstream_class("unet_classic", "UNetClassic") is network
    assert {name: sys.modules.get(name) for name in before} == before


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(
        UserError, match=r"the baseline cno needs packages .*\(No module named .*\): run \./launch/setup"
    ):
        upstream_class("cno", "CNO")


def test_training_wavelit_imports_no_baseline_and_no_http() -> None:
    packages = ("tltorch", "timm", "wandb", "aiohttp")
    code = f"import sys, fm.cli, fm.training.trainer; print([m for m in {packages} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


RECIPES = Path(__file__).parents[3] / "recipes"


def load(name: str) -> Recipe:
    return load_recipe(RECIPES / "baselines" / f"{name}.yaml")


def test_there_is_a_recipe_for_each() -> None:
    assert {file.stem for file in (RECIPES / "baselines").glob("*.yaml")} == {*SIZES}


@pytest.mark.parametrize("name", [*SIZES])
def test_a_recipe_is_the_quickstart_but_for_its_network(name: str) -> None:
    quickstart, recipe = load_recipe(RECIPES / "quickstart.yaml"), load(name)
    compile((RECIPES / "baselines" / f"{name}.yaml").read_text(), name, "exec")
    assert recipe.run.name == f"baseline_{name}"
    for section in ("data", "sampling", "loss", "checkpoint", "validation"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    assert quickstart.model is not None
    assert recipe.baseline is not None
    assert recipe.train == dataclasses.replace(quickstart.train, optimizer="adamw")  # a baseline has no blocks for Muon
    assert (recipe.baseline.wavelet, recipe.baseline.predict) == (quickstart.model.wavelet, quickstart.model.predict)


@pytest.mark.parametrize("name", [*SIZES])
def test_a_recipe_has_the_quickstarts_number_of_parameters(name: str) -> None:
    pytest.importorskip("tltorch" if name in ("fno", "tfno") else "huggingface_hub", reason="needs the extra baselines")
    specs = [make_spec(dataset) for dataset in STATE_CHANNELS]

    def parameters(recipe: Recipe) -> int:
        return new_model(recipe.baseline or recipe.model, specs, context=recipe.data.context).num_parameters()

    assert parameters(load(name)) == pytest.approx(parameters(load_recipe(RECIPES / "quickstart.yaml")), rel=0.1)
