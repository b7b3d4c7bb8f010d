"""Which files of the Well to download: their addresses, from the_well's list or from a server's listing of a folder.

Whether a file of the Well has arrived whole: what can be told without its card and without reading its arrays.

Downloads the Well's HDF5 files: estimate first, several at a time, resumed, retried, each verified after arrival.

A file arrives as `<name>.part` and takes its name once it is known to be whole, so whatever bears a final name is good.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import h5py
from tqdm import tqdm

from data_pipeline.files import UserError, is_disk_full, only_process, sync
from data_pipeline.registry import Card, Registry
from data_pipeline.remote import Missing, RemoteFile, RemoteFolder, Retries, check_name
from data_pipeline.schema import Line, Mismatch, Name, Strict, nearest, read_yaml, validate
from data_pipeline.well.hdf5 import SPLITS, WellFile
from data_pipeline.well.layout import plain_dataset, plain_group, texts
from data_pipeline.well.stats import parse_stats, read_stats
from data_pipeline.workers import Threads

PARTIAL_SUFFIX = ".part"
_MAX_REGISTRY_BYTES = 4 * 2**20  # the_well's has 180 kB

UrlRegistry = dict[str, dict[str, list[str]]]  # dataset -> "stats" or a split -> URLs


@dataclass(frozen=True)
class Wanted:
    """One file to have: where it comes from, where it goes, and how it stands."""

    dataset: str
    source: RemoteFile
    path: Path
    size: int | None = None  # as the server says
    there: bool = False  # whole, under its final name

    @property
    def partial(self) -> Path:
        """Return the path under which the file is downloaded before it is whole."""
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    @property
    def held(self) -> int:
        """Bytes that an interrupted run has left."""
        held = self.partial.stat().st_size if self.size is not None and self.partial.is_file() else 0
        return held if held <= (self.size or 0) else 0

    @property
    def missing(self) -> int:
        """Return the bytes that are still to be downloaded."""
        return 0 if self.there else (self.size or 0) - self.held

    def __str__(self) -> str:
        return f"{self.dataset}/{self.path.as_posix().rpartition(f'/datasets/{self.dataset}/')[2]}"


def chosen_splits(splits: Sequence[str] | None) -> list[str]:
    """Return the chosen splits in the order train, valid, test; None means all. Raises UserError for other names."""
    for split in splits or ():
        if split not in SPLITS:
            raise UserError(f"split {split!r}: no such split. {nearest(split, SPLITS)}")
    return [split for split in SPLITS if splits is None or split in splits]


def url_registry(path: Path | None) -> UrlRegistry:
    """the_well's registry.yaml, or another of its form, checked: names, splits and addresses of HDF5 files.

    It is data of another package, so nothing in it is trusted: not a name as a folder, not an address as a file.
    """
    file: Traversable = files("the_well") / "utils" / "registry.yaml" if path is None else path
    listed: dict[str, _Addresses] = validate(
        dict[Name, _Addresses], read_yaml(file, _MAX_REGISTRY_BYTES), str(file), _check_different_names
    )
    return {
        name: {"stats": [one.stats]} | {split: list(getattr(one, split)) for split in SPLITS}
        for name, one in listed.items()
    }


@dataclass(frozen=True)
class _Addresses(Strict):
    """Addresses of a dataset's files in the_well's registry.yaml."""

    stats: Line
    train: tuple[Line, ...] = ()
    valid: tuple[Line, ...] = ()
    test: tuple[Line, ...] = ()


def _check_different_names(listed: dict[str, _Addresses]) -> None:
    for name, one in listed.items():
        for split in SPLITS:
            bases = [_file_name(address) for address in getattr(one, split)]
            if len(set(bases)) < len(bases):
                raise Mismatch("addresses of files with different names", at=(name, split))


def _file_name(address: str) -> str:
    """The name that a file from this address gets; UserError unless it is a plain name of an HDF5 file."""
    name = unquote(address.rpartition("/")[2])
    if not _is_hdf5(check_name(name, address)):
        raise UserError(f"{address}: expected the address of an .hdf5 or .h5 file")
    return name


def _is_hdf5(name: str) -> bool:
    return name.endswith((".hdf5", ".h5")) and not name.startswith(".")


def from_urls(
    out: Path, dataset: str, known: UrlRegistry, splits: Sequence[str], first_only: bool, retries: Retries
) -> Iterator[Wanted]:
    """The files of a dataset by their addresses."""
    if dataset not in known:
        raise UserError(f"dataset {dataset!r}: the_well names no addresses for it. {nearest(dataset, known)}")
    folder = out / "datasets" / dataset
    yield Wanted(dataset, RemoteFile(known[dataset]["stats"][0], retries), folder / "stats.yaml")
    for split in splits:
        for address in known[dataset][split][: 1 if first_only else None]:
            yield Wanted(dataset, RemoteFile(address, retries), folder / "data" / split / _file_name(address))


def from_folder(
    out: Path,
    dataset: str,
    base: RemoteFolder,
    known: UrlRegistry,
    splits: Sequence[str] | None,
    first_only: bool,
) -> Iterator[Wanted]:
    """The files of a dataset below a base URL: those the server lists; those the_well names if it lists none."""
    validate(Name, dataset, "--datasets")
    source, folder = base / dataset, out / "datasets" / dataset
    listed = _listed(source, known.get(dataset), splits or SPLITS)
    yield Wanted(dataset, source.file("stats.yaml"), folder / "stats.yaml")
    for split in splits or SPLITS:
        for name in listed[split][: 1 if first_only else None]:
            # `file` refuses a name that is a path
            yield Wanted(dataset, (source / "data" / split).file(name), folder / "data" / split / name)


def _listed(source: RemoteFolder, known: dict[str, list[str]] | None, splits: Sequence[str]) -> dict[str, list[str]]:
    """Names of the HDF5 files of each split; says where the_well's list is used, or names others."""
    expected = {split: [_file_name(address) for address in known[split]] if known else [] for split in splits}
    data = source / "data"
    try:
        present = data.names()
        found = {split: list(filter(_is_hdf5, (data / split).names())) if split in present else [] for split in splits}
        reason = f"{data}: the server lists no HDF5 files in {', '.join(splits)}"
    except UserError as error:
        found, reason = {}, str(error)
    if not any(found.values()):
        if known is None:
            raise UserError(f"{reason}; and the_well has no list of the files of {source.name!r}. Check --from")
        print(f"{source.name}: {reason}; using the_well's list of files")
        return expected
    for split in splits:
        missing = set(expected[split]) - set(found[split])
        if missing or not found[split]:
            note = f"; {len(missing)} of the {len(expected[split])} that the_well names are not among them"
            print(f"{source.name}: {split}: the server lists {len(found[split])} files{note if missing else ''}")
    return found


def damage(path: Path, size: int | None) -> str | None:
    """What is wrong with a file that has arrived, or None: its size, an HTML page, no HDF5, not the Well's layout."""
    found = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, most likely an error message of the server"
    if size is not None and found != size:
        return f"it holds {found} bytes where the server has {size}"
    if path.name.removesuffix(PARTIAL_SUFFIX).endswith(".yaml"):
        try:
            content = parse_stats(path)
        except UserError as error:
            return str(error)
        return None if isinstance(content, dict) and content else "it is no YAML mapping"
    try:
        with h5py.File(path, "r") as opened:
            return _layout_damage(opened)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError) as error:
        return f"it is truncated or no HDF5 file ({error})"
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        return f"it is not in the Well's layout ({error})"


def _layout_damage(file: h5py.File) -> str | None:
    """Compares each field's shape with the trajectories, frames and grid that the file itself declares."""
    dimensions = plain_group(file, "dimensions", "dimensions")
    axes = texts(dimensions.attrs["spatial_dims"])
    num_trajectories = int(file.attrs["n_trajectories"])
    num_frames, *grid = (plain_dataset(dimensions, name, name).shape[-1] for name in ("time", *axes))
    if min(num_trajectories, num_frames, *grid) < 1:
        return f"it declares {num_trajectories} trajectories of {num_frames} frames on the grid {grid}"
    for order in range(3):
        group = plain_group(file, f"t{order}_fields", f"t{order}_fields")
        for name in texts(group.attrs["field_names"]):
            data = plain_dataset(group, name, f"field {name!r}")
            shape = (num_trajectories,) * bool(data.attrs["sample_varying"])
            shape += (num_frames,) * bool(data.attrs["time_varying"])
            shape += tuple(size for size, varies in zip(grid, data.attrs["dim_varying"], strict=True) if varies)
            shape += (len(grid),) * order
            if data.shape != shape:
                return f"its field {name!r} has the shape {data.shape} where the file declares {shape}"
    return None


_LOOKS_AT_ONCE = 8  # requests for sizes in flight
_HOPELESS = 8  # failures without a success after which the server counts as gone
_MOST_LISTED = 20  # failures in the message
_TICK_SECONDS = 0.2  # between two looks at what has come

T = TypeVar("T")
R = TypeVar("R")


def download(
    out: Path,
    registry: Registry,
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    first_only: bool = False,
    source: str | None = None,
    jobs: int = 4,
    dry_run: bool = False,
    urls: Path | None = None,
    retries: Retries | None = None,
) -> None:
    """Fetches datasets into `out`/datasets/<name>/{stats.yaml,data/<split>/*.hdf5}, as the-well-download lays them out.

    datasets: names; None means those with a card. splits: None means all. first_only: one file of each split.
    source: a URL with <dataset>/{stats.yaml,data/<split>/*.hdf5} below it; None means the addresses in the_well's
    registry, or in `urls`, another file of that form. dry_run: prints the estimate and writes nothing.

    Prints the estimate and a line per dataset. Raises UserError before the first byte when the disk is too small, and
    at the end, with all reasons, when some files could not be had; what could be is there, and a rerun gets the rest.
    """
    if jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {jobs}")
    names = sorted(set(registry.cards if datasets is None else datasets))
    chosen = chosen_splits(splits)
    retries = retries or Retries()
    known = url_registry(urls)
    wanted: list[Wanted] = []
    for name in names:
        if source is None:
            wanted += from_urls(out, name, known, chosen, first_only, retries)
        else:
            wanted += from_folder(out, name, RemoteFolder(source, retries), known, splits and chosen, first_only)
    looked, failures = _look(wanted)
    need, free = sum(one.missing for one in looked), shutil.disk_usage(_existing(out)).free
    _print_estimate(looked, out, need, free)
    if dry_run:
        _raise_failures(failures)
        return
    if need > free:
        raise UserError(
            f"{out}: {_readable(need)} are still to come, but the disk has {_readable(free)} free; choose another "
            "folder, or fewer --datasets, fewer --splits or --first-only"
        )
    with only_process(out, "`data-pipeline download`"):
        failures += _fetch_all([one for one in looked if not one.there], jobs)
    failures += _check_against_cards(looked, registry, {one for one, _ in failures})
    _print_result(looked, {one for one, _ in failures})
    _raise_failures(failures)


def _look(wanted: Sequence[Wanted]) -> tuple[list[Wanted], list[tuple[Wanted, str]]]:
    """Asks the server for the sizes and looks at what is here already; also what could not be asked for, and why.

    A dataset without a stats.yaml is not a failure: `shard` computes the statistics.
    """
    looked, failures = [], []
    with tqdm(total=len(wanted), desc="looking", unit="file", disable=None, leave=False) as bar:
        for one, result in _in_threads(_look_at, wanted, _LOOKS_AT_ONCE):
            bar.update()
            if isinstance(result, Wanted):
                looked.append(result)
            elif isinstance(result, Missing) and one.path.suffix == ".yaml":
                print(f"{one.dataset}: the server has no stats.yaml; `shard` will compute the statistics")
            else:
                failures.append((one, str(result)))
            if len(failures) >= _HOPELESS and not looked:
                _raise_failures(failures)
    return sorted(looked, key=lambda one: one.path), failures


def _look_at(one: Wanted) -> Wanted:
    size = one.source.size()
    return replace(one, size=size, there=one.path.exists() and damage(one.path, size) is None)


def _fetch_all(wanted: Sequence[Wanted], jobs: int) -> list[tuple[Wanted, str]]:
    """Fetches and verifies files; those that could not be had, with the reason."""
    failures = []
    stop, arrived = threading.Event(), _Count()

    def on_bytes(num_bytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        arrived.add(num_bytes)

    held, total = sum(one.held for one in wanted), sum(one.size or 0 for one in wanted)
    unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
    with tqdm(total=total, initial=held, desc="download", disable=None, **unit) as bar:

        def tick() -> None:
            bar.update(held + arrived.total - bar.n)

        try:
            for one, result in _in_threads(lambda one: _fetch(one, on_bytes), wanted, jobs, tick):
                if isinstance(result, UserError):
                    failures.append((one, str(result)))
        finally:
            stop.set()
    return failures


class _Stopped(Exception):
    """The run has ended, so this transfer does."""


class _Count:
    """A number that threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.total += number


def _fetch(one: Wanted, on_bytes: Callable[[int], None]) -> None:
    """Fetches one file, verifies it, and gives it its name. A bad arrival is removed: resuming it would not heal it."""
    try:
        one.path.parent.mkdir(parents=True, exist_ok=True)
        one.source.fetch(one.partial, one.size, on_bytes)
        fault = damage(one.partial, one.size)
        if fault is not None:
            one.partial.unlink()
            raise UserError(f"{one.source}: arrived, but {fault}; it was removed")
        with one.partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(one.partial, one.path)
        sync(one.path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise _DiskFull(
                f"{one.path}: the disk or the quota is full ({error.strerror}); what has come is kept; free some space "
                "and run the same command again, it goes on from there"
            ) from error
        raise


class _DiskFull(Exception):
    """No other file will fare better, so the run ends."""


def _in_threads(
    function: Callable[[T], R], items: Sequence[T], jobs: int, tick: Callable[[], object] = lambda: None
) -> Iterator[tuple[T, R | UserError]]:
    """Yields (item, function(item) or the UserError it raised) as they end; any other error is raised.

    On Ctrl-C, or when the caller stops, what has not begun is dropped and nobody waits for a server without an answer.
    """
    threads = Threads(jobs)
    waiting = {threads.submit(function, item): item for item in items}
    while waiting:
        done, _ = wait(waiting, _TICK_SECONDS, FIRST_COMPLETED)
        tick()
        for future in done:
            error = future.exception()
            if isinstance(error, _DiskFull):
                raise UserError(str(error)) from error
            if error is not None and not isinstance(error, UserError):
                raise error
            yield waiting.pop(future), future.result() if error is None else error


def _check_against_cards(looked: Sequence[Wanted], registry: Registry, failed: set[Wanted]) -> list[tuple[Wanted, str]]:
    """Whole files that are not what the dataset's card says. They stay: getting them again would not change them."""
    mismatches = []
    for one in looked:
        card = registry.cards.get(one.dataset)
        if card is None or one in failed:
            continue
        try:
            _check_against_card(one.path, card)
        except UserError as error:
            mismatches.append((one, f"is whole and was kept, but is not what the card says: {error}"))
    return mismatches


def _check_against_card(path: Path, card: Card) -> None:
    if path.suffix == ".yaml":
        read_stats(path, card)
    else:
        with WellFile(path, card):
            pass


def _print_estimate(looked: Sequence[Wanted], out: Path, need: int, free: int) -> None:
    for dataset in sorted({one.dataset for one in looked}):
        print(f"{dataset}: {_summary([one for one in looked if one.dataset == dataset])}")
    print(f"all: {_summary(looked)}; free at {out}: {_readable(free)}")
    unknown = sum(one.size is None and not one.there for one in looked)
    if unknown:
        print(f"the server does not tell the size of {unknown} of them")
    if need > free:
        print(f"the disk is too small by {_readable(need - free)}")


def _summary(looked: Sequence[Wanted]) -> str:
    there = sum(one.there for one in looked)
    total, missing = sum(one.size or 0 for one in looked), sum(one.missing for one in looked)
    return f"{len(looked)} files, {_readable(total)}; {there} of them there, {_readable(missing)} to fetch"


def _print_result(looked: Sequence[Wanted], failed: set[Wanted]) -> None:
    for dataset in sorted({one.dataset for one in looked}):
        ours = [one for one in looked if one.dataset == dataset]
        fetched = sum(not one.there and one not in failed for one in ours)
        bad = sum(one in failed for one in ours)
        print(
            f"{dataset}: {len(ours) - bad} files good, {fetched} of them fetched" + (f", {bad} failed" if bad else "")
        )


def _raise_failures(failures: Sequence[tuple[Wanted, str]]) -> None:
    if not failures:
        return
    lines = [f"  {one}: {reason}" for one, reason in failures[:_MOST_LISTED]]
    if len(failures) > _MOST_LISTED:
        lines.append(f"  and {len(failures) - _MOST_LISTED} more")
    raise UserError(
        "\n".join([f"{len(failures)} files failed:", *lines, "Run the same command again to get what is missing."])
    )


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above that exists: whose disk will hold it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _readable(num_bytes: int) -> str:
    """Bytes in decimal units: 12.3 GB."""
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{num_bytes} B"
