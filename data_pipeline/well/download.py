"""Download the Well: estimate first, several files at a time, resumed, retried, each verified after its arrival.

The addresses come from the_well's registry.yaml, or from a server's listing of a folder. A file arrives as
`<name>.part` and gets its final name once it is known to be whole, so every file with a final name is good.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import h5py

from data_pipeline.errors import UserError, is_disk_full
from data_pipeline.files import free_bytes, only_process, sync
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Registry
from data_pipeline.remote import RemoteFile, RemoteFolder, Retries, check_name
from data_pipeline.schema import Line, Mismatch, Name, Strict, nearest, read_yaml, validate
from data_pipeline.transport import Missing
from data_pipeline.well.hdf5 import SPLITS, WellFile, chosen_splits
from data_pipeline.well.layout import contradiction, hdf5_obstacle
from data_pipeline.well.stats import parse_stats, read_stats
from data_pipeline.workers import Stopped, Threads

PARTIAL_SUFFIX = ".part"
_MAX_REGISTRY_BYTES = 4 * 2**20  # the_well's has 180 kB
_LOOKS_AT_ONCE = 8  # requests for sizes in flight
_HOPELESS = 8  # failures without a success after which the server counts as gone
_MOST_LISTED = 20  # failures in the message

UrlRegistry = Mapping[str, Mapping[str, Any]]  # dataset -> "stats": URL, and each split: URLs
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Wanted:
    """One file to have: where it comes from, where it goes, and what of it is here."""

    dataset: str
    source: RemoteFile
    path: Path
    size: int | None = None  # as the server says
    there: bool = False  # whole, under its final name

    @property
    def partial(self) -> Path:
        """Where the file is while it arrives."""
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    @property
    def held(self) -> int:
        """Bytes that an interrupted run has left."""
        held = self.partial.stat().st_size if self.size is not None and self.partial.is_file() else 0
        return held if held <= (self.size or 0) else 0

    @property
    def missing(self) -> int:
        """Bytes to fetch."""
        return 0 if self.there else (self.size or 0) - self.held

    def __str__(self) -> str:
        return f"{self.dataset}/{self.path.as_posix().rpartition(f'/datasets/{self.dataset}/')[2]}"


_Remote = tuple[RemoteFile, dict[str, list[RemoteFile]]]  # stats.yaml of a dataset, and the files of each split
Failure = tuple[Wanted, str]  # a file, and why it could not be had


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
    """Fetch datasets into `out`/datasets/<name>/{stats.yaml,data/<split>/*.hdf5}, as the-well-download lays them out.

    `datasets` None takes those with a card but the extras, `splits` None all. `first_only` takes one file of each
    split. `source` is a URL with such folders below it; None takes the addresses in `urls`, a file in the form of
    the_well's registry.yaml, or in that one. `jobs` files come at a time.

    Prints the estimate and a line per dataset; with `dry_run`, no more is done. UserError before the first byte when
    the disk is too small, and at the end, with all reasons, when files could not be had or are not what their card
    says. What could be had is there, and a rerun gets the rest.
    """
    if jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {jobs}")
    chosen, retries, known = chosen_splits(splits), retries or Retries(), url_registry(urls)
    wanted: list[Wanted] = []
    for name in sorted({card.name for card in registry.select(None)} if datasets is None else set(datasets)):
        if source is None:
            stats, found = _from_urls(name, known, chosen, retries)
        else:
            stats, found = _from_folder(name, RemoteFolder(source, retries), known, chosen)
        folder = out / "datasets" / name
        wanted.append(Wanted(name, stats, folder / "stats.yaml"))
        for split, remotes in found.items():
            for remote in remotes[: 1 if first_only else None]:
                wanted.append(Wanted(name, remote, folder / "data" / split / _file_name(remote.url)))
    looked, failures = _look(wanted)
    need, free = sum(one.missing for one in looked), free_bytes(out)
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


def url_registry(path: Path | None) -> UrlRegistry:
    """Return the_well's registry.yaml, or another file of its form, checked: names, splits, addresses of HDF5 files.

    It is data of another package, so nothing in it is trusted: not a name as a folder, not an address as a file.
    """
    file: Traversable = files("the_well") / "utils" / "registry.yaml" if path is None else path
    content = read_yaml(file, _MAX_REGISTRY_BYTES)
    return {name: vars(one) for name, one in validate(dict[Name, _Addresses], content, str(file), _check_names).items()}


@dataclass(frozen=True)
class _Addresses(Strict):
    stats: Line
    train: tuple[Line, ...] = ()
    valid: tuple[Line, ...] = ()
    test: tuple[Line, ...] = ()


def _check_names(listed: dict[str, _Addresses]) -> None:
    for name, one in listed.items():
        for split in SPLITS:
            bases = [_file_name(address) for address in getattr(one, split)]
            if len(set(bases)) < len(bases):
                raise Mismatch("addresses of files with different names", at=(name, split))


def _file_name(address: str) -> str:
    """Return the name that a file from this address gets. UserError unless it is a plain name of an HDF5 file."""
    name = unquote(address.rpartition("/")[2])
    if not _is_hdf5(check_name(name, address)):
        raise UserError(f"{address}: expected the address of an .hdf5 or .h5 file")
    return name


def _is_hdf5(name: str) -> bool:
    return name.endswith((".hdf5", ".h5")) and not name.startswith(".")


def _from_urls(dataset: str, known: UrlRegistry, splits: Sequence[str], retries: Retries) -> _Remote:
    if dataset not in known:
        raise UserError(f"dataset {dataset!r}: the_well names no addresses for it. {nearest(dataset, known)}")
    found = {split: [RemoteFile(address, retries) for address in known[dataset][split]] for split in splits}
    return RemoteFile(known[dataset]["stats"], retries), found


def _from_folder(dataset: str, base: RemoteFolder, known: UrlRegistry, splits: Sequence[str]) -> _Remote:
    """Return the files of a dataset below a base URL: those the server lists; if none, those the_well names."""
    validate(Name, dataset, "--datasets")
    folder = base / dataset
    listed = _listed(folder, known.get(dataset), splits)
    # `file` refuses a name that is a path.
    found = {split: [(folder / "data" / split).file(name) for name in names] for split, names in listed.items()}
    return folder.file("stats.yaml"), found


def _listed(source: RemoteFolder, known: Mapping[str, Any] | None, splits: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the HDF5 files of each split; print where the_well's list is used, or has other names."""
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


def _look(wanted: Sequence[Wanted]) -> tuple[list[Wanted], list[Failure]]:
    """Ask the server for the sizes and look at what is here already.

    A dataset without a stats.yaml is not a failure: `shard` computes the statistics.
    """
    looked: list[Wanted] = []
    failures: list[Failure] = []
    with progress_bar(total=len(wanted), desc="looking", unit="file", leave=False) as bar:
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


def damage(path: Path, size: int | None) -> str | None:
    """Return what is wrong with a file that has arrived, or None, without its card and without reading its arrays.

    It may have another size, be an HTML page, or not be HDF5 in the Well's layout. Raises UserError if something else
    keeps it from being read, such as a lock: it may be whole, so it is neither removed nor fetched again.
    """
    try:
        found = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError as error:
        raise UserError(f"{path}: {hdf5_obstacle(error)}") from error
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, most likely an error message of the server"
    if size is not None and found != size:
        return f"it holds {found} bytes where the server has {size}"
    try:
        if path.name.removesuffix(PARTIAL_SUFFIX).endswith(".yaml"):
            content = parse_stats(path)
            return None if isinstance(content, dict) and content else "it is no YAML mapping"
        with h5py.File(path, "r") as opened:
            return contradiction(opened)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError) as error:
        if obstacle := hdf5_obstacle(error):
            raise UserError(f"{path}: {obstacle}") from error
        return f"it is truncated or no HDF5 file ({error})"
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        return f"it is not in the Well's layout ({error})"


def _fetch_all(wanted: Sequence[Wanted], jobs: int) -> list[Failure]:
    """Fetch and verify files; return those that could not be had, with the reason."""
    failures = []
    stop, lock = threading.Event(), threading.Lock()
    held, total = sum(one.held for one in wanted), sum(one.size or 0 for one in wanted)
    with progress_bar(total=total, initial=held, desc="download", unit="B") as bar:

        def on_bytes(num_bytes: int) -> None:
            if stop.is_set():
                raise Stopped
            with lock:
                bar.update(num_bytes)

        try:
            for one, result in _in_threads(lambda one: _fetch(one, on_bytes), wanted, jobs):
                if isinstance(result, UserError):
                    failures.append((one, str(result)))
        finally:
            stop.set()
    return failures


class _DiskFull(UserError):
    """No other file can arrive either, so the run ends."""


def _fetch(one: Wanted, on_bytes: Callable[[int], None]) -> None:
    """Fetch one file, verify it, and give it its name. A bad one is removed, as resuming it would not correct it."""
    try:
        one.path.parent.mkdir(parents=True, exist_ok=True)
        one.source.fetch(one.partial, one.size, on_bytes)
        fault = damage(one.partial, one.size)
        if fault is not None:
            one.partial.unlink()
            raise UserError(f"{one.source}: arrived, but {fault}; it was removed")
        sync(one.partial)
        one.partial.replace(one.path)
        sync(one.path.parent)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise _DiskFull(
            f"{one.path}: the disk or the quota is full ({error.strerror}); what has come is kept; free some space and "
            "run the same command again"
        ) from error


def _in_threads(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[tuple[T, R | UserError]]:
    """Yield (item, function(item) or the UserError it raised) as they end. _DiskFull and other errors are raised.

    When the caller stops, on Ctrl-C say, what has not begun is dropped, and a server that does not answer is not
    waited for.
    """
    threads = Threads(jobs)
    futures = {threads.submit(function, item): item for item in items}
    for future in as_completed(futures):
        error = future.exception()
        if error is not None and (isinstance(error, _DiskFull) or not isinstance(error, UserError)):
            raise error
        yield futures[future], future.result() if error is None else error


def _check_against_cards(looked: Sequence[Wanted], registry: Registry, failed: set[Wanted]) -> list[Failure]:
    """Return whole files that cannot be used with the dataset's card. They stay: another copy would be the same."""
    mismatches = []
    for one in looked:
        card = registry.cards.get(one.dataset)
        if card is None or one in failed:
            continue
        try:
            if one.path.suffix == ".yaml":
                read_stats(one.path, card)
            else:
                with WellFile(one.path, card):
                    pass
        except UserError as error:
            mismatches.append((one, f"is whole and was kept, but cannot be used with the card: {error}"))
    return mismatches


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
        fetched, bad = sum(not one.there and one not in failed for one in ours), sum(one in failed for one in ours)
        failures = f", {bad} failed" if bad else ""
        print(f"{dataset}: {len(ours) - bad} files good, {fetched} of them fetched{failures}")


def _raise_failures(failures: Sequence[Failure]) -> None:
    if not failures:
        return
    lines = [f"  {one}: {reason}" for one, reason in failures[:_MOST_LISTED]]
    if len(failures) > _MOST_LISTED:
        lines.append(f"  and {len(failures) - _MOST_LISTED} more")
    raise UserError(
        "\n".join([f"{len(failures)} files failed:", *lines, "Run the same command again to get what is missing."])
    )


def _readable(num_bytes: int) -> str:
    """Return bytes in decimal units: 12.3 GB."""
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
