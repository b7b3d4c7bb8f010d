"""Which files of the Well to download: their addresses, from the_well's list or from a server's listing of a folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from urllib.parse import unquote

import yaml

from data_pipeline import strict_yaml
from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFile, RemoteFolder, Retries, check_name
from data_pipeline.strict_yaml import Node
from data_pipeline.well.hdf5 import SPLITS

PARTIAL_SUFFIX = ".part"
_MAX_YAML_BYTES = 4 * 2**20  # of the_well's registry (180 kB) or a stats.yaml (some kB)

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
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    @property
    def held(self) -> int:
        """Bytes that an interrupted run has left."""
        held = self.partial.stat().st_size if self.size is not None and self.partial.is_file() else 0
        return held if held <= (self.size or 0) else 0

    @property
    def missing(self) -> int:
        return 0 if self.there else (self.size or 0) - self.held

    def __str__(self) -> str:
        return f"{self.dataset}/{self.path.as_posix().rpartition(f'/datasets/{self.dataset}/')[2]}"


def chosen_splits(splits: Sequence[str] | None) -> list[str]:
    for split in splits or ():
        if split not in SPLITS:
            raise UserError(f"split {split!r}: no such split. {strict_yaml.nearest(split, SPLITS)}")
    return [split for split in SPLITS if splits is None or split in splits]


def url_registry(path: Path | None) -> UrlRegistry:
    """the_well's registry.yaml, or another of its form, checked: names, splits and addresses of HDF5 files.

    It is data of another package, so nothing in it is trusted: not a name as a folder, not an address as a file.
    """
    file: Traversable = files("the_well") / "utils" / "registry.yaml" if path is None else path
    root = Node(load_yaml(file), str(file))
    registry: UrlRegistry = {}
    for name, node in root.entries().items():
        Node(name, root.file).name()
        entries = node.record(("stats",), SPLITS)
        registry[name] = {"stats": [entries["stats"].text()]}
        for split in SPLITS:
            addresses = [item.text() for item in entries[split].elements()] if split in entries else []
            registry[name][split] = addresses
            bases = [_file_name(address) for address in addresses]
            if len(set(bases)) < len(bases):
                entries[split].fail("addresses of files with different names")
    return registry


def load_yaml(file: Traversable) -> object:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_YAML_BYTES + 1)
        if len(content) > _MAX_YAML_BYTES:
            raise UserError(f"{file}: expected at most {_MAX_YAML_BYTES} bytes, got more")
        return yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: expected plain YAML, got something else: {reason}") from error


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
        raise UserError(
            f"dataset {dataset!r}: the_well names no addresses for it. {strict_yaml.nearest(dataset, known)}"
        )
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
    Node(dataset, "--datasets").name()
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
