"""Folders and files of a Well, on this machine or behind a URL: the same few questions to both."""

import os
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFile, RemoteFolder, is_url

Folder = Path | RemoteFolder
File = Path | RemoteFile
MAX_TEXT_BYTES = 16 * 2**20


def folder_at(location: str | Path | RemoteFolder) -> Folder:
    """The folder at a local path or a URL. Raises UserError for a URL of a kind that is not opened."""
    if isinstance(location, RemoteFolder):
        return location
    return RemoteFolder(str(location)) if is_url(location) else Path(location)


def child_names(folder: Folder) -> list[str]:
    """Names of what is directly in a folder, sorted; none if there is no such local folder.

    Raises UserError when a server does not list the folder.
    """
    if isinstance(folder, RemoteFolder):
        return folder.names()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def child_file(folder: Folder, name: str) -> File:
    """The file of that name in a folder, which need not be there."""
    return folder.file(name) if isinstance(folder, RemoteFolder) else folder / name


def file_bytes(file: File) -> int:
    """Size of a file. Raises UserError when a server does not tell it."""
    if isinstance(file, Path):
        return file.stat().st_size
    size = file.size()
    if size is None:
        raise UserError(f"{file}: the server does not tell the file's size; download the file first")
    return size


def read_range(file: File, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file."""
    if isinstance(file, RemoteFile):
        return file.read_range(start, stop)
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def read_small(file: File) -> bytes:
    """All of a small text file. Raises UserError for one of more than MAX_TEXT_BYTES."""
    if isinstance(file, RemoteFile):
        return file.read(MAX_TEXT_BYTES)
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise UserError(f"{file}: expected a text of at most {MAX_TEXT_BYTES} bytes, got more")
    return file.read_bytes()


def open_for_hdf5(file: File) -> Path | BinaryIO:
    """What h5py.File takes."""
    return file if isinstance(file, Path) else file.open()
