"""A benchmark on the console and in files."""

import json
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.benchmark.result import Benchmark
from fm.benchmark.tables import benchmark_text


def check_targets(json_file: Path | None, markdown_file: Path | None, profiles: Path | None) -> None:
    """Make the folder of profiles. UserError, before minutes are spent, where that of a file is missing."""
    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{option}: no folder {file.parent}; make it first")
    try:
        if profiles is not None:
            profiles.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile: cannot make the folder {profiles}: {error.strerror}") from error


def write(found: Benchmark, json_file: Path | None, markdown_file: Path | None) -> None:
    """Print the tables, and write them and every number where that is asked for."""
    text = benchmark_text(found)
    print(text, end="")
    for option, file, content in (
        ("--json", json_file, json.dumps(found.to_json(), indent=1) + "\n"),
        ("--markdown", markdown_file, text),
    ):
        if file is None:
            continue
        try:
            with atomic_file(file, durable=False) as out:
                out.write(content.encode())
        except OSError as error:
            raise UserError(f"{option}: cannot write {file}: {error.strerror}") from error
