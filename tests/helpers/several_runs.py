"""Run recipes one after another in the processes of one launch: several_runs.py CLIP RECIPE ...

Starting the processes takes longer than a tiny run. All recipes must have the same train.clip, which DeepSpeed takes
when it starts.
"""

import sys
from pathlib import Path

from data_pipeline.errors import UserError
from fm.config import load_recipe
from fm.distributed import StopSignal, make_accelerator
from fm.training.trainer import train_with

accelerator = make_accelerator(float(sys.argv[1]))
for file in map(Path, sys.argv[2:]):
    try:
        code = train_with(load_recipe(file), accelerator, StopSignal())
        accelerator.print(f"{file.stem}: exit code {code}", flush=True)
    except UserError as error:
        accelerator.print(f"{file.stem}: error: {error}", flush=True)
    accelerator.free_memory()
accelerator.end_training()
