"""Downloads the Well's HDF5 files: estimate first, several at a time, resumed, retried, each verified after arrival.

A file arrives as `<name>.part` and takes its name once it is known to be whole, so whatever bears a final name is good.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data_pipeline.cards.registry import Card, Registry
from data_pipeline.errors import UserError
from data_pipeline.files import is_disk_full, only_process, sync_directory
from data_pipeline.remote import RemoteFolder, Retries
from data_pipeline.threads import Threads
from data_pipeline.transport import Missing
from data_pipeline.well.addresses import Wanted, chosen_splits, from_folder, from_urls, url_registry
from data_pipeline.well.arrival import damage
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.stats import read_stats

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
        sync_directory(one.path.parent)
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
