"""The training loop: load; while step < steps: train_step, save, validate.

Pretraining and rollout finetuning differ by recipe, not by code. Which windows, teacher-forcing coins and learning
rate a step gets is a function of (recipe, step), so continuing a run is arithmetic. With adaptive sampling the windows
depend on the history of shares too, which the checkpoints hold.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.cards.registry import load_registry
from data_pipeline.errors import UserError
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.loader import open_readers, scheduled_batches, sources
from data_pipeline.windows.reader import ShardReader
from fm.checkpoint import load_checkpoint, load_pretrained, newest_checkpoint
from fm.checkpoint_writer import CheckpointWriter, take_snapshot
from fm.ema import EMA
from fm.mixing import Mixing
from fm.model import ModelConfig, WaveLiTFM
from fm.optim import learning_rate, make_optimizer, set_learning_rate
from fm.record import RunRecord, StepResult
from fm.runtime import EXIT_DONE, EXIT_INTERRUPTED, StopSignal, make_accelerator
from fm.settings import Recipe, changed_settings, recipe_to_dict
from fm.specs import check_names, dataset_specs
from fm.tracking import lacks_validation
from fm.unroll import Unroll, forcing_coins, forcing_prob
from fm.validation import validate


def train(recipe: Recipe) -> int:
    """Run a recipe to its end, to run.stop_at, or to the first signal that asks it to stop.

    Returns the exit code; UserError for what the user can mend.
    """
    with StopSignal().listen() as stop:
        trainer = Trainer(recipe)
        if trainer.step >= recipe.train.steps and not trainer.owes_validation:
            trainer.accelerator.print(f"{trainer.directory} is finished at step {trainer.step}; nothing to train.")
            return EXIT_DONE
        if recipe.run.stop_at is not None and trainer.step >= recipe.run.stop_at:
            trainer.accelerator.print(f"{trainer.directory} is at step {trainer.step}, where run.stop_at ends it.")
            return EXIT_DONE
        with trainer.open_record() as record, trainer.writer:
            code = trainer.train(stop, record)
        trainer.accelerator.end_training()
        return code


class Trainer:
    """A run: its data, model, optimiser, averaged weights, step, and the record of what happened."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe.train.precision)
        self.directory = recipe.run.directory
        self.registry = load_registry(recipe.data.registry)
        self.checkpoints = self.directory / "checkpoints"
        self.writer = CheckpointWriter(self.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every)
        check_names(recipe.data.datasets, self.registry)
        self.readers = self._open("train")
        self.valid_readers = self._open("valid") if recipe.validation.every else {}
        self.mixing = Mixing(recipe, sources(self.readers, recipe.window_length))
        self.model = self._build_model().to(self.accelerator.device)
        self.ema = EMA(self.model, recipe.train.ema)
        optimizer = make_optimizer(self.model, recipe.train)
        self.step = self._resume(optimizer)  # optimiser steps done
        # read by all processes before they meet in prepare, and so before the main one makes up for it
        self.owes_validation = self._killed_while_validating_the_end()
        self.objective, self.optimizer = self.accelerator.prepare(Unroll(self.model, recipe.loss), optimizer)
        self.skipped = 0

    def open_record(self) -> RunRecord:
        """The record of this run from the step it continues at; silent but on the main process."""
        active = self.accelerator.is_main_process
        return RunRecord(self.recipe, self.mixing.schedule, self.model, self.step, active=active)

    def train(self, stop: StopSignal, record: RunRecord) -> int:
        """Step to the end of the run; returns the exit code."""
        settings = self.recipe.train
        batches = self._batches()
        every = self.recipe.validation.every
        if self.owes_validation or (every and self.step and self.step % every == 0):
            self.validate(record)  # the checkpoint was written before this step's validation
        while self.step < settings.steps:
            result = self.train_step(batches, stop, record)
            record.step(result)
            last = self.step == settings.steps
            stopped = result.stop or self.step == self.recipe.run.stop_at
            if last or stopped or self.step % self.recipe.checkpoint.every == 0:
                self.save(record, wait=last or stopped)
            if stopped and not last:
                why = "interrupted" if result.stop else "run.stop_at"
                record.say(f"{why}: saved step {self.step}; the same command continues from here.")
                return EXIT_INTERRUPTED if result.stop else EXIT_DONE
            if every and (self.step % every == 0 or (last and self.step > every)):
                self.validate(record)
        return EXIT_DONE

    def train_step(self, batches: Iterator[Batch], stop: StopSignal, record: RunRecord) -> StepResult:
        """Fetch, forward, backward, clip, check on all processes that everything is finite, move."""
        settings, started = self.recipe.train, time.perf_counter()
        self._report_save(self.writer.failure(), record)
        torch.manual_seed(self.recipe.run.seed * 1_000_003 + self.step)  # so that any random layer resumes exactly
        lr = learning_rate(self.step, settings)
        set_learning_rate(self.optimizer, lr)
        drawn, losses, waited = [], [], 0.0
        for micro in range(settings.accumulate):
            fetch = time.perf_counter()
            batch = next(batches).to(self.accelerator.device, non_blocking=True)
            waited += time.perf_counter() - fetch
            terms = self._forward_backward(batch, last=micro == settings.accumulate - 1)
            drawn.append(self.mixing.schedule.draw(batch.draw))
            assert drawn[-1].dataset == batch.dataset  # else a loader read ahead with shares that have changed since
            losses.append(torch.stack([terms["loss"].detach(), terms["mse"], terms["wavelet_l1"]]))
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), settings.clip)
        every_rank, stopped = self._agree(torch.stack(losses), norm, stop.received)
        finite = bool(torch.isfinite(every_rank).all())
        if finite:
            self.optimizer.step()
            self.ema.update(self.model, self.step)
        else:
            record.say(self._refuse([draw.dataset for draw in drawn], every_rank))
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        mean = every_rank[:, :-1].mean(dim=0).view(-1, 3)  # (accumulations, 3)
        return StepResult(
            step=self.step,
            datasets=tuple(draw.dataset for draw in drawn),
            grids=tuple(self.readers[draw.dataset].manifest.grid for draw in drawn),
            windows=hashlib.sha256("".join(draw.digest() for draw in drawn).encode()).hexdigest()[:16],
            losses=tuple(mean[:, 0].tolist()),
            mse=float(mean[:, 1].mean()),
            wavelet_l1=float(mean[:, 2].mean()),
            grad_norm=float(every_rank[:, -1].max()),
            lr=lr,
            samples=settings.batch * settings.accumulate,
            model_calls=self.recipe.window_length - 1,
            data_seconds=waited,
            seconds=time.perf_counter() - started,
            moved=finite,
            stop=stopped,
        )

    def save(self, record: RunRecord, wait: bool) -> None:
        """Begin to write a checkpoint on the main process, after the one before is written; all processes meet here.

        `wait` until it is on disk where no step follows that would say that it failed.
        """
        if self.accelerator.is_main_process:
            self._report_save(self.writer.wait(), record)
            record.settle(self.step)
            facts = {
                "recipe": recipe_to_dict(self.recipe),
                "registry": self.registry.snapshot(),
                "shards": self._shard_digests(),
                "sampling": self.mixing.state(),
            }
            optimizer = self.optimizer.optimizer
            self.writer.start(take_snapshot(self.step, self.model, self.ema.model, optimizer, facts))
            if wait and (failure := self.writer.wait()):
                raise failure  # whatever checkpoint.on_error: no later save makes up for this one
        self.accelerator.wait_for_everyone()

    def validate(self, record: RunRecord) -> None:
        """Score the averaged weights on the valid split, on the main process; all processes meet here."""
        ratios = None
        if self.accelerator.is_main_process:
            result = validate(self.ema.model, self.valid_readers, self.recipe.validation, self.accelerator.device)
            record.validation(result, self.step)
            ratios = result.ratios()
        if self.mixing.changes_at(self.step):
            unscored = self.mixing.follow(ratios, self.step, self.accelerator)
            record.shares(self.mixing.schedule, unscored, self.step)
        self.accelerator.wait_for_everyone()

    def _report_save(self, failure: UserError | None, record: RunRecord) -> None:
        """Stop the run where a save has failed, or say so and go on (checkpoint.on_error)."""
        if failure is None:
            return
        if self.recipe.checkpoint.on_error == "stop":
            raise failure
        note = "Training goes on (checkpoint.on_error: continue); the next save tries again."
        record.event(f"{failure}\n{note}", self.step)

    def _open(self, split: str) -> dict[str, ShardReader]:
        data = self.recipe.data
        stream = data.stream(self.recipe.sampling.shuffle, self.recipe.sampling.shards_per_block)
        return open_readers(data.shards, data.datasets, split, data.verify, stream, known=tuple(self.registry.cards))

    def _build_model(self) -> WaveLiTFM:
        finetune, config = self.recipe.finetune, self.recipe.model
        specs = dataset_specs(self.readers, self.registry)
        if finetune is None:
            return WaveLiTFM(config or ModelConfig(), specs)
        pretrained = load_pretrained(Path(finetune.pretrained))
        if config is not None and config != pretrained.config:
            raise UserError(
                f"model: the recipe's architecture is not that of {finetune.pretrained}.\n"
                f"Recipe: {config}\nPretrained: {pretrained.config}\nLeave the section out to take the pretrained one."
            )
        return pretrained.adapted_to(specs)

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        if self.recipe.checkpoint.resume == "never":
            return 0
        say = print if self.accelerator.is_main_process else (lambda _: None)
        found = newest_checkpoint(self.checkpoints, say)
        if found is None:
            return 0
        state = load_checkpoint(found, self.model, self.ema.model, optimizer)
        digests = self._shard_digests()
        if state["shards"] != digests:
            changed = sorted(name for name in digests if state["shards"].get(name) != digests[name])
            raise UserError(
                f"{found}: trained on other shards of {', '.join(changed)} than those in {self.recipe.data.shards}; "
                "the run would not see the same windows. Put the shards back, or start afresh with run.dir=... "
                "(finetune.pretrained takes the weights along)."
            )
        if "sampling" in state:
            self.mixing.restore(state["sampling"], state["step"])
        if state["step"] < self.recipe.train.steps:
            say(f"continuing {self.directory} from step {state['step']}")
        for line in changed_settings(state["recipe"], recipe_to_dict(self.recipe)):
            say(f"  changed since: {line}")
        return int(state["step"])

    def _killed_while_validating_the_end(self) -> bool:
        every, steps = self.recipe.validation.every, self.recipe.train.steps
        due = every and self.step == steps and (steps % every == 0 or steps > every)
        return bool(due) and lacks_validation(self.directory / "events.jsonl", steps)

    def _shard_digests(self) -> dict[str, str]:
        return {name: reader.manifest.digest for name, reader in self.readers.items()}

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from the current step to the last.

        Batches are read ahead, so they are read up to where shares change; what follows is begun when its first batch
        is asked for, which is after the validation.
        """
        accumulate = self.recipe.train.accumulate
        while self.step < self.recipe.train.steps:
            yield from scheduled_batches(
                self.readers,
                self.mixing.schedule,
                length=self.recipe.window_length,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                start=self.step * accumulate,
                stop=self.mixing.known_until(self.step) * accumulate,
                workers=self.recipe.data.workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )

    def _forward_backward(self, batch: Batch, last: bool) -> dict[str, torch.Tensor]:
        """Loss and gradients of one draw; processes exchange gradients at the last draw of a step."""
        forced = torch.from_numpy(self._forced(batch.draw)).to(batch.fields.device)
        if last:
            terms = self.objective(batch.fields, batch.constants, forced, batch.dataset)
            self.accelerator.backward(terms["loss"] / self.recipe.train.accumulate)
        else:
            with self.accelerator.no_sync(self.objective):
                terms = self.objective(batch.fields, batch.constants, forced, batch.dataset)
                self.accelerator.backward(terms["loss"] / self.recipe.train.accumulate)
        return terms

    def _forced(self, draw: int) -> np.ndarray:
        """This process's rows of the draw's teacher-forcing coins."""
        train, finetune = self.recipe.train, self.recipe.finetune
        prob = forcing_prob(self.step, train.steps, finetune) if finetune else 1.0
        coins = forcing_coins(self.recipe.run.seed, draw, train.batch, self.recipe.window_length - 1, prob)
        return np.array_split(coins, self.accelerator.num_processes)[self.accelerator.process_index]

    def _agree(self, losses: torch.Tensor, norm: torch.Tensor, stop: bool) -> tuple[torch.Tensor, bool]:
        """Losses (accumulations x 3) and gradient norm of every process, (processes, n); whether any was stopped."""
        mine = torch.cat([losses.flatten().float(), norm.reshape(1).float(), losses.new_tensor([float(stop)])])
        everyone = self.accelerator.gather(mine[None]).cpu()
        return everyone[:, :-1], bool(everyone[:, -1].any())

    def _refuse(self, datasets: list[str], every_rank: torch.Tensor) -> str:
        """A step with a non-finite loss or gradient: what to say of skipping it, or UserError to stop the run."""
        ranks = (~torch.isfinite(every_rank).all(dim=1)).nonzero().flatten().tolist()
        what = f"step {self.step + 1}: non-finite loss or gradient on {', '.join(datasets)} (processes {ranks})"
        settings = self.recipe.train
        self.skipped += 1
        if settings.nonfinite == "skip" and self.skipped <= settings.max_skips:
            return f"{what}: step skipped, {self.skipped} of at most {settings.max_skips}"
        raise UserError(
            f"{what}. The optimiser did not move; the newest checkpoint in {self.checkpoints} is from before it.\n"
            "Lower train.learning_rate or train.clip, look at the data with `data-pipeline inspect`, or let the run "
            "pass over such steps with train.nonfinite=skip."
        )
