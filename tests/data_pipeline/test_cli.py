"""The command line as a user meets it: real processes, exit codes, one message."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.registry import load_registry

COMMAND = str(Path(sys.executable).with_name("data-pipeline"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_simulate_shard_inspect_verify(tmp_path: Path) -> None:
    well, shards = tmp_path / "well", tmp_path / "shards"
    names = "gray_scott_reaction_diffusion,helmholtz_staircase"
    done = run("simulate", "--preset", "tiny", "--out", well, "--datasets", names, "--seed", 1, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    done = run("shard", "--well", well, "--out", shards, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": written, 1 shard, ") == 6
    done = run("shard", "--well", well, "--out", shards)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": already there, 1 shard, ") == 6
    done = run("verify", shards)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": good, ") == 6
    done = run("inspect", shards)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][:9] == ["dataset", "split", "trajectories", "frames", "windows", "grid", "channels", "shards", "MB"]
    row = next(line for line in lines if line[:2] == ["helmholtz_staircase", "train"])
    assert row[5:7] == ["64x16", "2+1"]
    assert row[9:11] == ["open", "open"]
    shares = [float(line[-1]) for line in lines if line[1:2] == ["train"]]
    assert sum(shares) == pytest.approx(1, abs=0.002)


def test_paper_tables() -> None:
    done = run("inspect", "--paper")
    assert done.returncode == 0, done.stderr
    for card in load_registry().select(None):
        assert card.name in done.stdout or card.abbreviation in done.stdout


def test_reader_that_leaves_early_is_no_error_message() -> None:
    process = subprocess.Popen([COMMAND, "inspect", "--paper"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, b"")


def test_verify_names_what_differs(tiny_shards: Path, tmp_path: Path) -> None:
    for name in ("shear_flow", "helmholtz_staircase"):
        shutil.copytree(tiny_shards / name, tmp_path / name)
    shard = tmp_path / "shear_flow" / "valid" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1  # in the first frame
    shard.write_bytes(content)
    done = run("verify", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {shard}: trajectory 0, frame 0: its checksum is wrong")
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/shear_flow/valid: damaged" in done.stdout
    assert f"{tmp_path}/helmholtz_staircase/test: good" in done.stdout
    assert run("verify", tmp_path, "--datasets", "shear_flow", "--splits", "train,test").returncode == 0


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys\n"
        "from data_pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'h5py', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("simulate", "shard", "inspect", "verify"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "--well", "{tmp}/no", "--out", "{tmp}/out"], "expected datasets as {tmp}/no/<dataset>/data/<split>"),
        (["shard", "--well", "{well}", "--out", "{tmp}/out", "--datasets", "shear_flo"], "shear_flow"),
        (
            ["shard", "--well", "{well}", "--out", "{tmp}/out", "--splits", "dev"],
            "split 'dev': expected train, valid, test",
        ),
        (["shard", "--well", "{well}", "--out", "{well}/shear_flow/stats.yaml"], "choose another folder"),
        (["simulate", "--preset", "tiny", "--out", "{tmp}/out", "--datasets", "shear_flo"], "shear_flow"),
        (["inspect"], "expected a folder of shards or --paper"),
        (["inspect", "{tmp}"], "make shards with `data-pipeline shard`"),
        (["verify", "{tmp}"], "make shards with `data-pipeline shard`"),
        (["verify", "{shards}", "--datasets", "shear_flow", "--splits", "dev"], "expected shards of dev"),
    ],
)
def test_mistake_ends_in_one_message(
    tiny_well: Path, tiny_shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"tmp": tmp_path, "well": tiny_well, "shards": tiny_shards}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message.format(**places) in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_simulate_onto_a_full_disk(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from data_pipeline.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        f"sys.exit(main(['simulate', '--preset', 'tiny', '--out', {str(tmp_path)!r}, '--jobs', '1', "
        "'--datasets', 'helmholtz_staircase']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f"{tmp_path}/helmholtz_staircase/data/" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.hdf5"))


def test_a_folder_without_a_card_is_told_how_to_get_one(
    tmp_path: Path, tiny_well: Path, capsys: pytest.CaptureFixture
) -> None:
    well = tmp_path / "well"
    (well / "lava" / "data" / "train").mkdir(parents=True)
    for command in (["audit", str(well)], ["shard", "--well", str(well), "--out", str(tmp_path / "shards")]):
        assert main(command) == 2
        assert f"no card describes lava: `data-pipeline register {well}/lava` drafts one" in capsys.readouterr().err
    (well / "shear_flow").symlink_to(tiny_well / "shear_flow")
    assert main(["audit", str(well), "--splits", "valid", "--jobs", "1"]) == 0
    assert "left out, no card describes lava: `data-pipeline register` drafts one" in capsys.readouterr().err
