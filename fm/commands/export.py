"""fm export: a run as a folder that others can use."""

import argparse
from pathlib import Path

from data_pipeline.errors import UserError
from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="a run's averaged weights with cards, scores and a model card, for others to use",
        description="Write a run's averaged weights to a folder that needs no shards and none of your cards: "
        "WaveLiTFM.from_pretrained(DIR), fm evaluate DIR and finetune.pretrained take it.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder to write; an earlier export is replaced")
    export.add_argument("--report", type=Path, metavar="FOLDER", help="scores and pictures (default: RUN/report)")
    export.add_argument(
        "--program",
        action="append",
        default=[],
        metavar="DATASET",
        help="also export this dataset's step as a program for torch alone (torch.export); may be repeated",
    )
    export.add_argument("--push", metavar="ORG/NAME", help="upload to the Hugging Face Hub, too (`hf auth login`)")
    export.add_argument("--licence", default="MIT", metavar="SPDX", help="licence of the weights (default: MIT)")
    export.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.export.build import export_run
    from fm.pretrained import upload

    address = f"hf://{options.push}" if options.push else None
    folder = export_run(options.run, options.folder, options.report, options.program, options.licence, address)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; read {folder / 'README.md'}")
    if options.push:
        try:
            print(f"pushed: {upload(folder, options.push)}")
        except (OSError, ValueError) as error:
            raise UserError(f"--push: {error}. The export in {folder} is whole; push it again.") from error
    return 0
