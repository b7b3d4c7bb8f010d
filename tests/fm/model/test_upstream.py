"""The_well's models are imported alone: nothing that they do not use, nothing left behind, a clear error."""

import subprocess
import sys

import pytest

from data_pipeline.files import UserError
from fm.model.baselines import UNUSED, upstream_class


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


def test_training_wavelit_imports_no_baseline() -> None:
    code = (
        "import sys, fm.cli, fm.training.trainer; print([m for m in ('tltorch', 'timm', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
