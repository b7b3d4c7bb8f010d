"""model.adapter_rank: low-rank updates of the trunk by dataset, in the model and in whole runs; and without them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_inputs, make_spec, stir
from handmade_export import exported
from safetensors.torch import load_file
from whole_runs import DATASETS, log, small

from data_pipeline.errors import UserError
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main
from fm.config import Recipe
from fm.datasets import finetuned_config
from fm.lab.hardware import GPUS, AssumedSpeed
from fm.lab.plan import estimated_plan
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.loss import wavelit_loss
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.finetune import plan_finetuning
from fm.training.trainer import train

CONFIG = ModelConfig(width=16, depth=2, heads=2)
NAMES = ("acoustic_scattering_maze", "active_matter", "rayleigh_benard")
MAZE, WAVES = DATASETS
NEW = "shear_flow"
# Of a block of width 16: input, gate, activation, output 16 x 16; query_key 32 x 16; expand 64 x 16; contract 16 x 64
SIDES = 4 * (16 + 16) + (32 + 16) + 2 * (64 + 16)


def model_of(rank: int, *names: str) -> WaveLiTFM:
    return WaveLiTFM(dataclasses.replace(CONFIG, adapter_rank=rank), [make_spec(name) for name in names or NAMES])


def step(model: WaveLiTFM, name: str) -> torch.Tensor:
    return model(*make_inputs(model.specs[name]), name)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "model.safetensors")


def test_without_adapters_the_model_is_that_of_before_the_option() -> None:
    model = stir(model_of(0))
    assert len(model.state_dict()) == 80
    assert not any("adapter" in name for name in model.state_dict())
    assert "adapter_rank" not in model.description()["config"]
    prediction = step(model, "rayleigh_benard")
    loss = wavelit_loss(prediction, torch.zeros_like(prediction), model.residual_scale("rayleigh_benard")).total.mean()
    assert float(loss.detach()) == pytest.approx(44.067596, rel=1e-6)  # measured before there were adapters


@pytest.mark.parametrize("bf16", [False, True])
def test_new_adapters_change_no_prediction(bf16: bool) -> None:
    plain, adapted = stir(model_of(0)), model_of(3)
    names = {name for name in adapted.state_dict() if name.startswith("adapters.")}
    assert names == adapted.state_dict().keys() - plain.state_dict().keys()
    adapted.load_state_dict({**adapted.state_dict(), **plain.state_dict()})
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert all(torch.equal(step(plain, name), step(adapted, name)) for name in NAMES)
    added = plain.adapted_to(list(plain.specs.values()), 3)
    assert all(torch.equal(one, adapted.state_dict()[name]) for name, one in added.state_dict().items())


def test_an_adapted_matrix_is_the_matrix_plus_the_product_and_others_are_untouched() -> None:
    adapted = stir(model_of(2))
    assert isinstance(adapted.adapters, torch.nn.ModuleDict)
    plain = model_of(0)
    shared = {name: one for name, one in adapted.state_dict().items() if not name.startswith("adapters.")}
    plain.load_state_dict(shared)
    before = {name: step(adapted, name) for name in NAMES}
    merged = dict(shared)
    for name in [one for one in shared if one.startswith("blocks.") and shared[one].ndim == 2]:
        _, place, *_, matrix, _ = name.split(".")
        pair = [adapted.state_dict()[f"adapters.active_matter.{place}.{side}.{matrix}"] for side in ("up", "down")]
        merged[name] = (shared[name].double() + pair[0].double() @ pair[1].double()).float()
    assert sum(not torch.equal(merged[name], one) for name, one in shared.items()) == 14
    plain.load_state_dict(merged)
    torch.testing.assert_close(before["active_matter"], step(plain, "active_matter"), rtol=1e-4, atol=1e-4)
    plain.load_state_dict(shared)
    assert not torch.allclose(before["active_matter"], step(plain, "active_matter"), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.startswith("adapters.active_matter."):
                parameter.fill_(float("nan"))
    assert torch.equal(step(adapted, "rayleigh_benard"), before["rayleigh_benard"])


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter_rank: expected at most the width, .*16, got 17"):
        dataclasses.replace(CONFIG, adapter_rank=17)


@pytest.fixture(scope="module")
def joint(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run without adapters. Read only."""
    run = tmp_path_factory.mktemp("adapters") / "joint"
    assert train(small(tiny_shards, run, train={"steps": 4})) == 0
    return run


def test_a_run_with_adapters_continues_bit_for_bit_and_a_step_moves_the_datasets_own(
    tiny_shards: Path, tmp_path: Path
) -> None:
    muon, every = {"steps": 4, "optimizer": "muon", "warmup_steps": 0}, {"every": 1, "keep": 9}
    whole = small(tiny_shards, tmp_path / "whole", model={"adapter_rank": 2}, train=muon, checkpoint=every)
    assert train(whole) == 0
    cut = dataclasses.replace(whole, run=dataclasses.replace(whole.run, dir=str(tmp_path / "cut"), stop_at=2))
    assert train(cut) == 0
    assert train(dataclasses.replace(cut, run=dataclasses.replace(cut.run, stop_at=None))) == 0
    trained, again = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(again[name], one) for name, one in trained.items())
    drawn = [line["dataset"] for line in log(tmp_path / "whole")]
    states = [load_file(file) for file in sorted((tmp_path / "whole/checkpoints").glob("*/model.safetensors"))]
    again_drawn = [place for place in range(1, 4) if drawn[place] in drawn[:place]]  # else its head was zero
    assert again_drawn
    for place in again_drawn:
        before, after = states[place - 1], states[place]
        own = {name.split(".")[1] for name in after if "adapters." in name and not after[name].equal(before[name])}
        assert own == {drawn[place]}
    assert not any("momentum_buffer" in key for key in moments(tmp_path / "whole") if "adapters." in key)  # AdamW's
    assert load_pretrained(tmp_path / "whole").config.adapter_rank == 2


def moments(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "optimizer.safetensors")


def finetuning(shards: Path, run: Path, pretrained: Path, rank: int | None, **sections: Any) -> Recipe:
    finetune = {"pretrained": str(pretrained), "unroll_steps": 1, "adapter_rank": rank}
    return small(shards, run, finetune=finetune, **{"train": {"steps": 2, "warmup_steps": 0}, **sections})


def test_finetuning_adds_adapters_to_a_model_without(
    joint: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_adapters = {"rates": {"embedding": 0.0, "trunk": 0.0}}
    recipe = finetuning(tiny_shards, tmp_path / "tuned", joint, 2, adapt=only_adapters)
    planned = estimated_plan(recipe, AssumedSpeed(GPUS["h200"], 0.5, bf16=True))
    assert train(recipe) == 0
    assert "adapters of rank 2 are added (finetune.adapter_rank)" in capsys.readouterr().out
    tuned, base = load_pretrained(tmp_path / "tuned"), load_pretrained(joint)
    before, after = base.state_dict(), weights(tmp_path / "tuned")
    moved = {name.split(".")[0] for name in before if not torch.equal(after[name], before[name])}
    assert moved == {"heads"}  # of the parameters that the model had
    ups = {name.split(".")[1]: one for name, one in after.items() if ".up.query_key" in name}
    drawn = {line["dataset"] for line in log(tmp_path / "tuned")}
    assert {name for name, one in ups.items() if one.any()} == drawn <= {line["dataset"] for line in log(joint)}

    # The written recipe runs again: it has the section model, with the rank.
    assert main(["train", str(tmp_path / "tuned/recipe.yaml"), f"run.dir={tmp_path / 'again'}"]) == 0
    assert all(torch.equal(one, after[name]) for name, one in weights(tmp_path / "again").items())

    own = 2 * SIDES  # rank x sides, one block
    assert tuned.num_parameters() - base.num_parameters() == len(DATASETS) * own
    assert planned.parameters == tuned.num_parameters()
    specs = base.specs.values()
    # A plan counts a dataset's own rows of the embedding, too: all channels of these datasets are their own.
    for spec in specs:
        head = sum(one.numel() for name, one in base.named_parameters() if name.startswith(f"heads.{spec.name}."))
        assert planned.datasets[spec.name].own_parameters == own + head + 16 + 16 * 4 * len(spec.channels)

    other = finetuning(tiny_shards, tmp_path / "other", tmp_path / "tuned", 3)
    with pytest.raises(UserError, match=r"finetune\.adapter_rank: .*tuned has adapters of rank 2, got 3; leave it out"):
        train(other)
    with pytest.raises(UserError, match=r"finetune\.adapter_rank: expected at most the width.*, 16, got 17"):
        train(finetuning(tiny_shards, tmp_path / "other", joint, 17))
    document = dataclasses.replace(other, model=dataclasses.replace(base.config, adapter_rank=3))
    with pytest.raises(UserError, match=r"the recipe's architecture is not .*\n.*\n.*\n.*finetune\.adapter_rank adds"):
        train(dataclasses.replace(document, finetune=dataclasses.replace(other.finetune, adapter_rank=2)))


def test_a_baseline_gets_no_adapters(tmp_path: Path) -> None:
    pytest.importorskip("ptwt")
    wno = Baseline(BaselineConfig("wno", {"width": 8, "depth": 2, "levels": 3}), [make_spec(NEW)])
    with pytest.raises(UserError, match=r"finetune\.adapter_rank: expected a WaveLiT, .*wno is another network"):
        finetuned_config(finetuning(tmp_path, tmp_path / "tuned", tmp_path / "wno", 2), wno)


def test_export_and_extension_keep_adapters_and_a_frozen_trunk_trains_the_new_ones(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(small(tiny_shards, run, model={"adapter_rank": 2}, train={"steps": 2, "warmup_steps": 0})) == 0
    source = exported(load_pretrained(run), tmp_path / "exported", tiny_shards)
    assert json.loads((source / "model.json").read_text())["config"]["adapter_rank"] == 2
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / NEW).symlink_to(tiny_shards / NEW)
    overrides = ["train.steps=3", "validation.every=0", "adapt.alone_steps=1"]
    plan = plan_finetuning(str(source), [str(tmp_path / "new")], freeze=["trunk"], overrides=overrides)
    tuned = tmp_path / "tuned"
    command = ["extend", str(source), "--dataset", NEW, "--shards", str(tmp_path / "new"), "--out", str(tuned)]
    assert main(command) == 0
    assert f"{NEW}: a head that gives zeros; " in (said := capsys.readouterr().out)
    assert "adapters start at zero" in said
    extended, old = load_pretrained(tuned), load_pretrained(source)
    assert all(torch.equal(extended.state_dict()[name], one) for name, one in old.state_dict().items())
    recipe = dataclasses.replace(plan.recipe, run=dataclasses.replace(plan.recipe.run, dir=str(tmp_path / "frozen")))
    assert recipe.finetune is not None
    pretrained = dataclasses.replace(recipe.finetune, pretrained=str(tuned))
    assert train(dataclasses.replace(recipe, finetune=pretrained)) == 0
    after = weights(tmp_path / "frozen")
    moved = {name for name, one in after.items() if not one.equal(extended.state_dict()[name])}
    assert {f"adapters.{NEW}.0.up.expand", f"adapters.{NEW}.0.down.expand"} < moved
    assert not any(name.startswith("blocks.") for name in moved)
