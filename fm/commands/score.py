"""fm score: scores from stored errors, under any protocol that the same rollouts can serve, without the model."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from fm.commands.arguments import Commands

if TYPE_CHECKING:
    from fm.scores.errors import ErrorFile


def add(commands: Commands) -> None:
    score = commands.add_parser("score", help="scores from an evaluation's stored errors, without the model")
    score.add_argument("errors", type=Path, help="errors.npz, a report folder, or a run that was evaluated")
    score.add_argument("--protocol", metavar="NAME_OR_FILE", help="a name or a .yaml file (default: the errors' own)")
    score.add_argument("--eps", type=float, help="added to the variance of the target (default: the protocol's)")
    score.add_argument("--out", type=Path, metavar="DIR", help="write a report there: errors, scores, tables, pictures")
    score.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.scores.errors import ErrorFile, find_errors
    from fm.scores.rescore import rescore
    from fm.scores.tables import score_table

    file = find_errors(options.errors)
    measured = ErrorFile.load(file)
    errors, scores = rescore(measured, options.protocol, options.eps)
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out {options.out}: expected a folder to write a report into, got a file")
        if options.out.resolve() == file.resolve().parent and errors.protocol != measured.protocol:
            raise UserError(
                f"--out {options.out}: expected another folder than that of {file}, whose errors were measured under "
                f"protocol {measured.protocol.name}: that evaluation would be replaced"
            )
        _write(options.out, errors, scores, file.with_name("samples.npz"))
    print(score_table(scores), end="")
    return 0


def _write(out: Path, errors: "ErrorFile", scores: Mapping[str, Any], stored: Path) -> None:
    """A report as the evaluation's own, with pictures where it kept their fields, and the tables in more formats."""
    from fm.report.sample import load_samples
    from fm.report.write import write_report
    from fm.scores.rescore import write_tables

    samples = []
    for sample in load_samples(stored) if stored.is_file() else []:
        try:
            part = errors.datasets[sample.dataset]
            vrmse = part.rollout_vrmse(sample.trajectory, sample.channel, sample.steps, errors.protocol.eps)
        except (LookupError, ValueError):
            raise UserError(
                f"{stored}: expected fields of rollouts in the errors.npz beside it, got {sample.dataset}, trajectory "
                f"{sample.trajectory}, {sample.channel}, which that does not have: bring the two files of one "
                "evaluation together, or remove samples.npz for a report without pictures of fields"
            ) from None
        samples.append(dataclasses.replace(sample, vrmse=vrmse))
    write_tables(out, scores)
    write_report(out, errors, scores, samples)
