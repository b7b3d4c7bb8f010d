"""Runs a recipe: connects the processes, builds its trainer, keeps others out of its directory, and starts over where
the guard rolls it back.
"""

from contextlib import nullcontext

from accelerate import Accelerator

from data_pipeline.files import only_process
from fm.runtime import EXIT_DONE, StopSignal, make_accelerator, naming_lost_processes
from fm.settings import Recipe
from fm.training.stepper import RollBack
from fm.training.trainer import Trainer


def train(recipe: Recipe) -> int:
    """Run a recipe to its end, to run.stop_at, or to the first signal that asks it to stop.

    Returns the exit code; UserError for what the user can mend.
    """
    back: RollBack | None = None
    with StopSignal().listen() as stop:
        with naming_lost_processes():
            accelerator = make_accelerator(recipe.train.clip)
        while True:
            try:
                return _train(recipe, accelerator, stop, back)
            except RollBack as again:
                back = again
                accelerator.free_memory()


def _train(recipe: Recipe, accelerator: Accelerator, stop: StopSignal, back: RollBack | None) -> int:
    with naming_lost_processes():
        trainer = Trainer(recipe, accelerator, passed_over=back.refused if back else ())
    say = trainer.say
    if trainer.step >= recipe.train.steps and not trainer.owes_validation:
        say(f"{trainer.directory} is finished at step {trainer.step}; nothing to train.")
        return EXIT_DONE
    if recipe.run.stop_at is not None and trainer.step >= recipe.run.stop_at:
        say(f"{trainer.directory} is at step {trainer.step}, where run.stop_at ends it.")
        return EXIT_DONE
    if trainer.gate.ends:
        say(f"{trainer.directory} was ended by finetune.gate at step {trainer.step}; raise it to go on.")
        return EXIT_DONE
    if trainer.step:
        say("\n  changed since: ".join([f"continuing {trainer.directory} from step {trainer.step}", *trainer.changes]))
    alone = only_process(trainer.directory, "training") if accelerator.is_main_process else nullcontext()
    with naming_lost_processes():
        with alone, trainer.open_record() as record, trainer.writer, naming_lost_processes():  # the record has its name
            if back is not None:
                record.refusal(back.refusal, trainer.step)
            code = trainer.train(stop, record)
        accelerator.wait_for_everyone()  # a launcher ends the others when the first has ended
    accelerator.end_training()
    return code
