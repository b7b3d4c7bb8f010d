"""The public names of `fm`: documented by pydoc, imported when they are used first, and opening every trained model."""

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import make_inputs
from whole_runs import DATASETS, small

import fm
from data_pipeline.errors import UserError
from fm.checkpoint import find_checkpoint
from fm.config import resolve
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.scores import Scores
from fm.model.baselines import Baseline
from fm.model.fields import FieldsWarning
from fm.model.surrogate import Surrogate
from fm.share.export import export_run
from fm.training.trainer import train

BASELINE = {"name": "wno", "sizes": {"width": 4, "depth": 1, "levels": 1}}


def test_pydoc_shows_every_public_method_with_its_docstring() -> None:
    page = pydoc.plain(pydoc.render_doc(fm.WaveLiTFM))
    own = [cls for cls in fm.WaveLiTFM.__mro__ if cls.__module__.startswith("fm.")]
    assert own == [fm.WaveLiTFM, Surrogate]
    names = {name for cls in own for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}
    assert names >= {"predict", "rollout", "from_pretrained", "save_pretrained", "push_to_hub"}
    for name in names:
        text = inspect.getdoc(getattr(fm.WaveLiTFM, name))
        assert text, name
        assert text.splitlines()[0] in page, name


def test_the_package_hands_on_what_it_names() -> None:
    page = pydoc.plain(pydoc.render_doc(fm))
    assert "WaveLiTFM" in page
    assert "load(path_or_hub_id" in page
    assert fm.__all__ == [name for name in fm.__all__ if getattr(fm, name)]
    assert "probably not" in (FieldsWarning.__doc__ or "")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, fm; print('torch' in sys.modules, fm.load.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "load", "False"]


@pytest.mark.parametrize("kind", ["wavelit", "baseline"])
def test_load_opens_a_run_its_checkpoint_and_its_export(kind: str, tiny_shards: Path, tmp_path: Path) -> None:
    document = {"run": {"name": kind, "dir": str(tmp_path / "run")}, "baseline": BASELINE, "train": {"steps": 2}}
    document |= {"data": {"shards": str(tiny_shards), "datasets": DATASETS}, "validation": {"every": 0}}
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 2}) if kind == "wavelit" else resolve(document, "x")
    assert train(recipe) == 0
    checkpoint = find_checkpoint(tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "exported")
    models = [fm.load(source) for source in (tmp_path / "run", str(checkpoint), exported)]
    for model in models:
        assert type(model) is {"wavelit": fm.WaveLiTFM, "baseline": Baseline}[kind]
        assert not model.training
        assert next(model.parameters()).device.type == "cpu"
        assert all(torch.equal(value, models[0].state_dict()[name]) for name, value in model.state_dict().items())
    spec = models[2].specs["helmholtz_staircase"]
    state, constants = make_inputs(spec, 32, 32)
    raw = models[2].denormalize(state, spec.name), constants * 0 + 1
    fields = dict(zip(spec.channels, torch.cat(raw, dim=1).unbind(1), strict=True))
    with pytest.warns(FieldsWarning):  # the constants are no maze
        predicted = models[2].predict({name: field.numpy() for name, field in fields.items()}, spec.name, steps=2)
    assert {name: array.shape for name, array in predicted.items()} == dict.fromkeys(
        spec.state_channels, (2, 2, 32, 32)
    )
    assert all(np.isfinite(array).all() for array in predicted.values())
    if kind == "baseline":
        with pytest.raises(ValueError, match=r"is of the baseline 'wno', not of a WaveLiTFM; fm\.load opens either"):
            fm.WaveLiTFM.from_pretrained(exported)
    else:
        with pytest.raises(ValueError, match=r"is of a WaveLiT, not of a Baseline; fm\.load opens either"):
            Baseline.from_pretrained(exported)


def test_load_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint found: looked for .*model\.json"):
        fm.load(tmp_path)
    with pytest.raises(UserError, match="expected an address such as hf://organization/name"):
        fm.load("hf://name")


def test_train_evaluate_and_load_from_python(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAVELIT_IMPORT", "")
    document = {
        "run": {"name": "own", "dir": str(tmp_path / "run")},
        "data": {"shards": str(tiny_shards), "datasets": DATASETS},
        "model": {"import": "own_classes:Net", "args": {"width": 3}},
        "train": {"steps": 4, "warmup_steps": 1},
        "validation": {"every": 0},
    }
    folder = fm.train(document, ["train.steps=2", "tracking.progress=false"])
    assert folder == tmp_path / "run"
    assert find_checkpoint(folder).name == "step_00000002"
    assert document["train"] == {"steps": 4, "warmup_steps": 1}
    model = fm.load(folder)  # the dictionary is the user's own word
    scores = fm.evaluate(model.train(), tiny_shards, protocol="thirds", windows=3)
    assert model.training
    assert scores.datasets.keys() == {*DATASETS}
    report = evaluate_run(folder, out=tmp_path / "report", protocol="thirds", windows=3)
    stored = Scores.load(report / "scores.json")
    for name in DATASETS:
        one, other = scores.datasets[name], stored.datasets[name]
        assert one.windows.keys() == other.windows.keys()
        assert one.one_step is not None
        assert other.one_step is not None
        assert one.one_step.median == pytest.approx(other.one_step.median, rel=1e-6)
    only = fm.evaluate(folder, tiny_shards, DATASETS[:1], "thirds", split="valid", windows=2)
    assert list(only.datasets) == DATASETS[:1]
    assert only.protocol.split == "valid"
    assert fm.train(folder / "recipe.yaml", ["train.steps=3"]) == folder
    with pytest.raises(UserError, match=r"datasets: expected those of the model, .*; got shear_flow"):
        fm.evaluate(model, tiny_shards, ["shear_flow"])
    with pytest.raises(UserError, match=r"(?s)fm\.train: .*unknown key train\.step .*did you mean train\.steps\?"):
        fm.train({**document, "train": {"step": 2}})
    with pytest.raises(UserError, match="windows: expected at least 1"):
        fm.evaluate(model, tiny_shards, windows=0)
