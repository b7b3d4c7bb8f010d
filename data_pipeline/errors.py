"""What commands say: the error for what a user can correct, clean text, and one way to run every command."""

import errno
import os
import reprlib
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from typing import Any, TextIO

MAX_MESSAGE = 6000  # characters: a screen or two
ENOUGH_OPEN_FILES = 65_536  # a hard limit may be a billion; programs that walk through all descriptors would crawl
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """Wrong input, missing data or a damaged file. The message gives what was expected, what came, where, what to do.

    Commands print the message alone and exit with code 2. Any other exception is a bug and keeps its traceback. This is
    no ValueError, so code that turns a library's ValueError into a UserError lets a UserError through.

    A message may quote a file of a stranger, so it holds no control characters and at most MAX_MESSAGE characters.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(printable(str(message)), MAX_MESSAGE))


def printable(text: str) -> str:
    """Return a text whose control characters, which terminals obey, are written as escapes."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class _PrintableOutput:
    """A stream of text that writes control characters as escapes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable_stdout() -> AbstractContextManager[object]:
    """Return a block in which nothing that is printed can control the terminal: names come from files of strangers."""
    return redirect_stdout(_PrintableOutput(sys.stdout)) if sys.stdout is not None else nullcontext()


def shortened(text: str, limit: int) -> str:
    """Return a text, or its beginning and its length where it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def brief(value: object) -> str:
    """Return a value for a message; a damaged file may hold a very long one."""
    return shortened(reprlib.repr(value), 80)


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command of `fm` or `data-pipeline`; return its exit code, after one message if it failed.

    2 for what the user can correct: UserError, and an error that the operating system gave, such as a full disk or a
    folder that cannot be read. 1 if the reader of our output has left, as `head` does. 130 for Ctrl-C.
    """
    code, message = 0, ""
    try:
        try:
            with printable_stdout():
                code = command() or 0
        except SystemExit:  # argparse has printed its help
            _flush(sys.stdout)
            raise
        _flush(sys.stdout)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code, message = 2, f"error: {_explain(error)}"
    except KeyboardInterrupt:
        code, message = 130, interrupted
    finally:
        with suppress(OSError):
            if message and sys.stderr is not None:
                print(message, file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):
            try:
                _flush(stream)
            except OSError:  # Python flushes both once more at exit, which would end in another message and code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # None if the shell closed it, as `>&-` does
        stream.flush()


def _explain(error: OSError) -> str:
    """Return the message for an error of the operating system. One of a library, without a number, is a bug."""
    if is_disk_full(error):
        return str(disk_full_error(error.filename or "the output", error))
    if error.errno is None:
        raise error
    if error.filename is None:
        return f"{error.strerror or error}; look for the cause in the system, then run the same command again"
    advice = "choose another folder" if isinstance(error, FileExistsError | NotADirectoryError) else "check the path"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        advice = "change its permissions, or choose another folder"
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {advice}"


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means: no space, no quota, or a file size limit.

    h5py gives the error's number in its message only.
    """
    return error.errno in _DISK_FULL or any(f"errno = {code}," in str(error) for code in _DISK_FULL)


def disk_full_error(path: object, error: OSError) -> UserError:
    """Return the error for a disk that filled up while `path` was written."""
    return UserError(
        f"{path}: cannot be written, the disk or the quota is full ({error.strerror or error}); "
        "nothing half written was kept; free some space and run the same command again, it goes on from there"
    )


def open_files_limit() -> int:
    """Raise this process's limit of open files as far as the system lets it, and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS states a hard limit that it does not allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def reason_and_remedy(error: OSError, remedy: str) -> str:
    """Return why a file could not be opened and what to do: `remedy`, unless too many other files are open."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = f"let a process open more than {open_files_limit()} files (ulimit -n)"
    return f"{error.strerror or error}; {remedy}"
