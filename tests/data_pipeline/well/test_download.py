"""Downloads from a server that fails end with whole, verified files, or with a message that names the bad ones."""

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import yaml
from faulty_server import PAGE, FaultyServer

from data_pipeline.errors import UserError
from data_pipeline.files import only_process
from data_pipeline.registry import Registry, load_registry
from data_pipeline.remote import Retries
from data_pipeline.shards.build import build_shards
from data_pipeline.well.download import download, url_registry

REGISTRY = load_registry()
EIGHT = [card.name for card in REGISTRY.select(None)]
NAME = "gray_scott_reaction_diffusion"
QUICK = Retries(attempts=3, first_wait_seconds=0.01, timeout_seconds=2)
ALWAYS = float("inf")


@pytest.fixture
def server(tiny_well: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    """Serves one dataset of the mini-Well, and tmp_path/extra for what a test adds."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_well / NAME, folder / NAME)
    with FaultyServer(folder) as server:
        yield server


def hdf5_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.hdf5"))}


def get(server: FaultyServer, out: Path, **options) -> None:
    download(out, REGISTRY, **{"datasets": [NAME], "source": server.url, "jobs": 2, "retries": QUICK} | options)


def train_file(server: FaultyServer) -> tuple[str, Path]:
    """A train file: its path on the server and on disk."""
    path = min((server.folder / NAME / "data" / "train").iterdir())
    return str(path.relative_to(server.folder)), path


def test_what_comes_is_what_is_served(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    get(server, out)
    served = server.folder / NAME
    assert hdf5_files(out / "datasets" / NAME) == hdf5_files(served)
    assert (out / "datasets" / NAME / "stats.yaml").read_bytes() == (served / "stats.yaml").read_bytes()
    assert not list(out.rglob("*.part"))
    num_bytes = sum(map(len, hdf5_files(served).values())) + (served / "stats.yaml").stat().st_size
    num_files = len(hdf5_files(served)) + 1
    said = capsys.readouterr().out
    assert f"{NAME}: {num_files} files, {num_bytes / 1e3:.1f} kB; 0 of them there" in said
    assert f"{NAME}: {num_files} files good, {num_files} of them fetched" in said
    assert build_shards(out, tmp_path / "shards", splits=["test"], jobs=1)

    server.reset()
    get(server, out)  # once more: nothing is to be done
    assert server.total_sent == 0
    assert f"{NAME}: {num_files} files good, 0 of them fetched" in capsys.readouterr().out


def test_choices(server: FaultyServer, tmp_path: Path) -> None:
    get(server, tmp_path / "one", first_only=True, splits=["valid", "train"])
    found = hdf5_files(tmp_path / "one" / "datasets" / NAME / "data")
    assert sorted(name.split("/")[0] for name in found) == ["train", "valid"]
    with pytest.raises(UserError, match="split 'tests': expected train, valid, test"):
        get(server, tmp_path / "two", splits=["tests"])
    with pytest.raises(UserError, match="--jobs: expected at least 1, got 0"):
        get(server, tmp_path / "two", jobs=0)
    with pytest.raises(UserError, match=r"--datasets: expected a name, got '\.\./x'"):
        get(server, tmp_path / "two", datasets=["../x"])
    with pytest.raises(
        UserError, match=r"no such file on the server.*the_well has no list of the files of 'unheard_of'"
    ):
        get(server, tmp_path / "two", datasets=["unheard_of"])
    assert not (tmp_path / "two").exists()


def test_dry_run_writes_nothing(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    get(server, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert server.total_sent == 0
    assert "0 of them there" in capsys.readouterr().out


def test_disk_too_small(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        UserError, match=r"\d kB are still to come, but the disk has 1\.0 kB free; choose another folder"
    ):
        get(server, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    get(server, tmp_path / "out", dry_run=True)
    assert "the disk is too small by" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["drop", "truncate", "html", "500", "503", "no_range"])
def test_failures_that_pass(server: FaultyServer, tmp_path: Path, kind: str) -> None:
    for path in (server.folder / NAME).rglob("*.hdf5"):
        server.fail(str(path.relative_to(server.folder)), kind, times=2)
    server.fail("*", "503", method="HEAD", times=2)
    get(server, tmp_path / "out")
    assert hdf5_files(tmp_path / "out" / "datasets" / NAME) == hdf5_files(server.folder / NAME)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("drop", "GET", "failed 3 times, the last time: ClientPayloadError"),
        ("truncate", "GET", r"failed 3 times, the last time: the server announces \d+ bytes where"),
        ("500", "GET", "the server answers 500"),
        ("404", "*", "no such file on the server"),
        ("403", "GET", "whether the file is open to you"),
        ("html", "*", "arrived, but it is a web page"),
    ],
)
def test_one_bad_file_does_not_stop_the_others(
    server: FaultyServer, tmp_path: Path, kind: str, method: str, message: str
) -> None:
    bad, source = train_file(server)
    server.fail(bad, kind, method=method, times=ALWAYS)
    with pytest.raises(UserError, match=f"1 files failed:\n  {bad}: .*{message}"):
        get(server, tmp_path / "out")
    good = hdf5_files(server.folder)
    content = good.pop(bad)
    assert hdf5_files(tmp_path / "out" / "datasets") == good
    server.heal()
    get(server, tmp_path / "out")
    assert (tmp_path / "out" / "datasets" / bad).read_bytes() == content == source.read_bytes()


def test_a_web_page_does_not_stay(server: FaultyServer, tmp_path: Path) -> None:
    bad, source = train_file(server)
    source.write_bytes(PAGE)
    (server.folder / NAME / "stats.yaml").write_bytes(PAGE)
    with pytest.raises(UserError, match=r"2 files failed:(\n.*arrived, but it is a web page, most likely.*){2}"):
        get(server, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("stats.yaml*")) + list((tmp_path / "out").rglob(f"{source.name}.part"))
    assert not (tmp_path / "out" / "datasets" / bad).exists()


def spoil_shape(file: h5py.File) -> None:
    values = file["t0_fields/A"][:, :-1]
    attributes = dict(file["t0_fields/A"].attrs)
    del file["t0_fields/A"]
    file["t0_fields/A"] = values
    file["t0_fields/A"].attrs.update(attributes)


def spoil_layout(file: h5py.File) -> None:
    del file["dimensions"]


def spoil_count(file: h5py.File) -> None:
    file.attrs["n_trajectories"] = 77


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shape, r"arrived, but its field 'A' has the shape \(\d, 8, .* where the file declares \(\d, 9,"),
        (spoil_layout, "arrived, but it is not in the Well's layout"),
        (spoil_count, r"has the shape .* where the file declares \(77, 9"),
    ],
)
def test_files_that_contradict_themselves(server: FaultyServer, tmp_path: Path, spoil, message: str) -> None:
    bad, source = train_file(server)
    with h5py.File(source, "r+") as file:
        spoil(file)
    with pytest.raises(UserError, match=message):
        get(server, tmp_path / "out", splits=["train"])
    assert not (tmp_path / "out" / "datasets" / bad).exists()


def test_truncated_on_the_server(server: FaultyServer, tmp_path: Path) -> None:
    _, source = train_file(server)
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(UserError, match="arrived, but it is truncated or no HDF5 file"):
        get(server, tmp_path / "out", splits=["train"])


def test_a_whole_file_that_is_not_the_cards_stays(server: FaultyServer, tmp_path: Path) -> None:
    """Fetching it again would change nothing, so nothing is fetched again; but each run says so."""
    bad, source = train_file(server)
    with h5py.File(source, "r+") as file:
        file["t0_fields"].move("A", "Z")
        file["t0_fields"].attrs["field_names"] = ["Z", "B"]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{bad}: is whole and was kept, but cannot be used with the card"):
            get(server, tmp_path / "out")
    assert (tmp_path / "out" / "datasets" / bad).exists()
    assert server.requests[bad] == 1


def test_leftovers_of_another_tool(server: FaultyServer, tmp_path: Path) -> None:
    """Truncated, a web page, or of the right size and no HDF5: all are noticed and fetched again."""
    names = sorted(str(path.relative_to(server.folder)) for path in (server.folder / NAME).rglob("*.hdf5"))[:3]
    for name, spoil in zip(names, (lambda b: b[:-1], lambda b: PAGE, lambda b: bytes(len(b))), strict=True):
        target = tmp_path / "out" / "datasets" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(spoil((server.folder / name).read_bytes()))
    get(server, tmp_path / "out")
    assert hdf5_files(tmp_path / "out" / "datasets" / NAME) == hdf5_files(server.folder / NAME)


def start_download(server: FaultyServer, out: Path) -> subprocess.Popen:
    """A download in a process of its own."""
    program = f"""
from pathlib import Path
from data_pipeline.well.download import download
from data_pipeline.registry import Registry, load_registry
download(Path({str(out)!r}), load_registry(), [{NAME!r}], source={server.url!r})
"""
    command = [sys.executable, "-c", program]

    def listen() -> None:  # where the tests run in the background of a shell, interrupts are ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=listen)


@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, b""), (signal.SIGINT, b"KeyboardInterrupt")])
def test_a_run_that_is_ended_in_the_middle(server: FaultyServer, tmp_path: Path, how: int, said: bytes) -> None:
    """What it has fetched is not fetched again: counted by the server."""
    name, source = train_file(server)
    out = tmp_path / "out"
    partial = out / "datasets" / f"{name}.part"
    server.fail(name, "stall", seconds=30, times=ALWAYS)
    process = start_download(server, out)
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size >= source.stat().st_size // 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing has arrived"
        time.sleep(0.02)
    process.send_signal(how)
    output, _ = process.communicate(timeout=20)  # it does not wait for the server
    assert said in output
    held = partial.stat().st_size
    server.heal()
    server.reset()
    get(server, out)
    assert hdf5_files(out / "datasets" / NAME) == hdf5_files(server.folder / NAME)
    assert server.sent[name] == source.stat().st_size - held < source.stat().st_size


def test_a_disk_that_fills_up(server: FaultyServer, tmp_path: Path) -> None:
    """As a limit on the size of files, which the operating system reports the same way."""
    name, source = train_file(server)
    out = tmp_path / "out"
    program = f"""
import resource
from pathlib import Path
from data_pipeline.well.download import download
from data_pipeline.errors import UserError
from data_pipeline.registry import Registry, load_registry
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
try:
    download(Path({str(out)!r}), load_registry(), [{NAME!r}], ["train"], source={server.url!r})
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "the disk or the quota is full (File too large); what has come is kept" in said
    get(server, out)
    assert (out / "datasets" / name).read_bytes() == source.read_bytes()


def test_two_runs_at_once(server: FaultyServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with only_process(out, "test"), pytest.raises(UserError, match="another `data-pipeline download` is writing here"):
        get(server, out)


def test_no_stats_on_the_server(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (server.folder / NAME / "stats.yaml").unlink()
    get(server, tmp_path / "out")
    assert f"{NAME}: the server has no stats.yaml; `shard` will compute the statistics" in capsys.readouterr().out


def test_server_that_is_gone(tmp_path: Path, tiny_well: Path) -> None:
    with FaultyServer(tiny_well) as server:
        pass
    with pytest.raises(UserError, match=r"8 files failed:(\n.*failed 3 times.*){8}\nRun the same command again"):
        get(server, tmp_path / "out", datasets=["shear_flow"])


def registry_file(server: FaultyServer, path: Path) -> Path:
    """A registry.yaml of the_well's form that leads to the server."""
    content = {
        NAME: {"stats": f"{server.url}/{NAME}/stats.yaml"}
        | {
            split: [f"{server.url}/{file.relative_to(server.folder)}" for file in sorted((folder).iterdir())]
            for split in ("train", "valid", "test")
            for folder in [server.folder / NAME / "data" / split]
        }
    }
    path.write_text(yaml.dump(content))
    return path


def test_addresses_of_a_registry(server: FaultyServer, tmp_path: Path) -> None:
    urls = registry_file(server, tmp_path / "registry.yaml")
    get(server, tmp_path / "out", source=None, urls=urls)
    assert hdf5_files(tmp_path / "out" / "datasets" / NAME) == hdf5_files(server.folder / NAME)
    with pytest.raises(UserError, match="dataset 'shear_flow': the_well names no addresses for it"):
        get(server, tmp_path / "out", source=None, urls=urls, datasets=["shear_flow"])


def test_extras_are_left_out_unless_they_are_named(server: FaultyServer, tmp_path: Path) -> None:
    """The server has no folder of PDEArena's data: asking for it fails."""
    extra = "pdearena_navier_stokes"
    two = Registry(REGISTRY.channel_cards, {name: REGISTRY.card(name) for name in (extra, NAME)})
    download(tmp_path / "out", two, source=server.url, retries=QUICK)
    assert [path.name for path in (tmp_path / "out" / "datasets").iterdir()] == [NAME]
    with pytest.raises(UserError, match=extra):
        download(tmp_path / "out", two, [extra], source=server.url, retries=QUICK)


def test_the_wells_registry_is_as_expected() -> None:
    """Of the package that is installed: the counts of the Well's file list for the eight datasets."""
    known = url_registry(None)
    counts = {split: sum(len(known[name][split]) for name in EIGHT) for split in ("train", "valid", "test")}
    assert counts == {"train": 162, "valid": 119, "test": 124}
    assert all(address.startswith("https://") for name in known for address in known[name]["train"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", r"expected a mapping \(key: value\)"),
        ("{../x: {stats: s}}", "expected a name, got '../x'"),
        ("{x: {train: []}}", "x: missing key 'stats'"),
        ("{x: {stats: s, tests: []}}", "unknown key 'tests'. Did you mean 'test'"),
        ("{x: {stats: s, test: https://h/a.hdf5}}", r"x\.test: expected a list"),
        ("{x: {stats: s, test: ['https://h/..']}}", r"expected a plain file name, got '\.\.'"),
        ("{x: {stats: s, test: ['https://h/a%2fb.hdf5']}}", "expected a plain file name, got 'a/b.hdf5'"),
        ("{x: {stats: s, test: ['https://h/a.sh']}}", "expected the address of an .hdf5 or .h5 file"),
        ("{x: {stats: s, test: ['https://h/a.h5', 'https://g/a.h5']}}", "files with different names"),
        ("{x: !!python/object/apply:os.system [id]}", "expected plain YAML"),
        ("{x: [", "expected plain YAML"),
    ],
)
def test_hostile_registries(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        download(tmp_path / "out", REGISTRY, ["x"], urls=path)
    assert not (tmp_path / "out").exists()


def test_addresses_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text("{x: {stats: 'file:///etc/passwd', test: ['pipe:id;/a.hdf5']}}")
    with pytest.raises(UserError, match="nothing else is opened"):
        download(tmp_path / "out", REGISTRY, ["x"], urls=path)
    with pytest.raises(UserError, match="nothing else is opened"):
        download(tmp_path / "out", REGISTRY, source="file:///etc")


def test_a_server_that_lists_nothing(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names come from the_well's list; for a dataset that it does not know there is no way."""
    for path in (f"{NAME}/data", f"{NAME}/data/train"):
        server.fail(path, "403", times=ALWAYS)
    with pytest.raises(UserError, match="12 files failed"):  # the Well has 6 a split, the mini-Well 2 of the same names
        get(server, tmp_path / "out", source=server.url)
    assert "whether the file is open to you; using the_well's list of files" in capsys.readouterr().out
    (server.folder / NAME).rename(server.folder / "my_data")
    server.fail("my_data/data", "403", times=ALWAYS)
    with pytest.raises(UserError, match="the_well has no list of the files of 'my_data'"):
        get(server, tmp_path / "out", datasets=["my_data"])


def test_names_that_a_server_lists_are_not_paths(server: FaultyServer, tmp_path: Path) -> None:
    folder = server.folder / NAME / "data" / "train"
    (folder / "a%2f..%2fb.hdf5").write_bytes(b"x")
    with pytest.raises(UserError, match="expected a plain file name"):
        get(server, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_a_card(server: FaultyServer, tmp_path: Path) -> None:
    (server.folder / NAME).rename(server.folder / "my_data")
    get(server, tmp_path / "out", datasets=["my_data"])
    assert hdf5_files(tmp_path / "out" / "datasets") == hdf5_files(server.folder)
