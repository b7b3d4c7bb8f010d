"""`fm sweep` on the command line: what is an option, what an override, and what is refused."""

from pathlib import Path

import pytest

from fm.cli import main

SWEEP = str(Path(__file__).parents[3] / "recipes" / "ablations" / "table14")


@pytest.mark.parametrize("words", [[SWEEP, "run.seed=3", "--out", "o"], [SWEEP, "--out", "o", "run.seed=3"]])
def test_overrides_stand_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *words]) == 2
    assert "override 'run.seed=3': a sweep names, places and seeds its own runs" in capsys.readouterr().err


def test_what_is_no_override_is_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", SWEEP, "--out", "o", "--step=3"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --step=3" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_are_above_0(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", SWEEP, f"--seconds={seconds}"]) == 2
    assert "--seconds: expected seconds of training above 0" in capsys.readouterr().err


def test_an_unknown_variant_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", SWEEP, "--only", "no rigde"]) == 2
    assert "Did you mean 'no ridge'?" in capsys.readouterr().err
