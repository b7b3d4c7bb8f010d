"""Makes the plan of a workload: counts what its steps do and hold, and takes their times from a probe or a ceiling."""

from collections.abc import Callable, Mapping

import numpy as np
import psutil
import torch
from tqdm import tqdm

from data_pipeline.cards.card import PATCH
from data_pipeline.windows.division import Division
from fm.cost import BACKWARD, Footprint, footprint, forward_flops, forward_passes, held_calls, kept_bytes
from fm.curriculum import unroll_length
from fm.planning.exchange import INFINIBAND, Interconnect, buckets
from fm.planning.gpus import STATE_TOUCHES, Ceiling
from fm.planning.plan import USABLE, DatasetPlan, Exchange, Plan
from fm.planning.probe import Measured, Probe
from fm.planning.workload import FLOAT_BYTES, DatasetWork, Workload
from fm.runtime import autocast_dtype
from fm.settings import Recipe
from fm.unroll import Unroll

# Copies of the parameters on the main process: weights, gradients, two moments, average, and the model with averaged
# weights that validates. DDP exchanges gradients through one more.
COPIES = 6


class Planner:
    """Counts what a workload's steps hold and do, for `processes` that share them; `bf16` is the precision of products.

    UserError where the global batch cannot be divided among the processes.
    """

    def __init__(self, workload: Workload, processes: int, bf16: bool) -> None:
        recipe = self.recipe = workload.recipe
        self.workload, self.processes, self.bf16 = workload, processes, bf16
        self.mixing = workload.mixing()
        train, way = recipe.train, recipe.sampling.draw
        self.micro_batch = Division(
            self.mixing.schedule, 0, processes, train.draws, way, train.micro_batch
        ).largest_piece
        self.model = workload.fake_model()
        self.parameters = self.model.num_parameters()
        self._one_call = Unroll(self.model, recipe.loss, None, torch.bfloat16 if bf16 else None)
        self.forward: dict[str, int] = {}
        self.kept: dict[str, float] = {}  # bytes, of one window and model call

    def count(self, traffic: bool) -> dict[str, Footprint]:
        """Count every dataset, with a progress bar; also what is moved, by dataset, where `traffic` is asked for."""
        moved = {}
        some = min(2, self.micro_batch)  # of several windows each keeps a little more than one alone
        for name, work in tqdm(self.workload.datasets.items(), desc="count", unit="dataset", leave=False):
            self.forward[name] = forward_flops(self.model, name, work.grid)
            if traffic:
                moved[name] = footprint(self._one_call, name, work.grid, some)
                self.kept[name] = moved[name].kept_bytes / some
            else:
                self.kept[name] = kept_bytes(self._one_call, name, work.grid, some) / some
        return moved

    def ceiling(self, ceiling: Ceiling, network: float = INFINIBAND) -> Plan:
        """The plan for GPUs of the table, in nodes of 8 with `network` GB/s each between them."""
        moved, train = self.count(traffic=True), self.recipe.train
        links, gradients = Interconnect(ceiling.gpu.link, network), float(FLOAT_BYTES * self.parameters)
        pieces = train.draws * -(-train.batch // self.processes // self.micro_batch)
        windows = train.global_batch / self.processes
        times = {}
        for name in self.workload.datasets:
            rounds = self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune))
            calls = rounds / forward_passes(1, None)  # as many forward and backward passes
            state = STATE_TOUCHES * FLOAT_BYTES * self.parameters
            seconds = ceiling.seconds(
                windows * rounds * self.forward[name],
                windows / min(2, self.micro_batch) * calls * moved[name].moved_bytes + state,
                pieces * calls * moved[name].operations,
            )
            backward = BACKWARD / rounds * seconds / pieces  # the last one, in which gradients get their final value
            exposed = links.after_backward(buckets(gradients), backward, self.processes)
            times[name] = Measured(seconds + exposed, 0, False, exposed)
        exchange, gpu = None, ceiling.gpu
        if self.processes > 1:
            sent = sum(links.all_reduce(size, self.processes) for size in buckets(gradients))
            exchange = Exchange(gradients, sent, links.link, links.network)
        kind = f"{gpu.bf16_tflops:g} TFLOP/s bf16" if self.bf16 else f"{gpu.float32_tflops:g} TFLOP/s float32"
        machine = f"{gpu.name}: {kind}, {gpu.bandwidth:g} GB/s, {gpu.memory:g} GB"
        return self._plan(machine, 1e9 * gpu.memory, times, ceiling.utilisation, exchange)

    def probe(self, seconds: float) -> Plan:
        """The plan for this machine, by a probe of about so many seconds."""
        self.count(traffic=False)
        memory = local_memory_bytes()
        tokens = {name: work.source.tokens for name, work in self.workload.datasets.items()}
        kept = {name: self._held(name) / tokens[name] for name in tokens}
        times = Probe(self.workload, self.processes, kept, memory).measure(seconds)
        grown = {}
        for name, measured in times.items():  # at full length
            full = forward_passes(self.recipe.window_length(name) - 1, self.recipe.finetune)
            mean = self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune))
            grown[name] = Measured(measured.seconds * mean / full, measured.steps, measured.extrapolated)
        if torch.cuda.is_available():
            machine = f"this machine, measured: {torch.cuda.get_device_name()}"
        else:
            machine = f"this machine, measured: CPU, {torch.get_num_threads()} threads"
        return self._plan(machine, memory, grown, None, None)

    def _held(self, name: str) -> float:
        """Bytes of activations of one window."""
        return self.kept[name] * held_calls(self.recipe.window_length(name) - 1, self.recipe.finetune)

    def _mean(self, name: str, of_calls: Callable[[int], float]) -> float:
        """Mean over the run of what depends on how many model calls a window takes."""
        finetune, steps = self.recipe.finetune, self.recipe.train.steps
        if finetune is None:
            return of_calls(1)
        some = np.linspace(0, steps - 1, min(steps, 1000)).astype(int).tolist()
        return float(np.mean([of_calls(unroll_length(step, steps, finetune, name)) for step in some]))

    def _plan(
        self,
        machine: str,
        memory: float,
        times: Mapping[str, Measured],
        utilisation: float | None,
        exchange: Exchange | None,
    ) -> Plan:
        recipe, train = self.recipe, self.recipe.train
        works = self.workload.datasets.values()
        state = FLOAT_BYTES * self.parameters * (COPIES + (self.processes > 1))
        per_window = max(self._held(work.name) + work.window_bytes for work in works)
        fitting = int(max(0.0, USABLE * memory - state) // per_window)
        one_call = max(self.kept[work.name] + work.window_bytes for work in works)
        counts = self.mixing.schedule.counts(train.steps * train.draws)
        return Plan(
            run=recipe.run.name,
            published=not any(work.measured_shards for work in works),
            machine=machine,
            steps=train.steps,
            global_batch=train.global_batch,
            processes=self.processes,
            parameters=self.parameters,
            state_bytes=state,
            input_bytes=self.micro_batch * max(work.window_bytes for work in works),
            memory_bytes=memory,
            utilisation=utilisation,
            exchange=exchange,
            validations=_validations(recipe),
            checkpoint_bytes=4 * FLOAT_BYTES * self.parameters,  # weights, average, two moments
            checkpoints=_checkpoints(recipe),
            micro_batch=self.micro_batch,
            fitting_micro_batch=fitting,
            checkpointing_helps=recipe.finetune is not None and one_call < 0.9 * per_window,
            datasets={work.name: self._dataset(work, counts[work.name], times[work.name]) for work in works},
            notes=self.workload.notes,
        )

    def _dataset(self, work: DatasetWork, draws: int, time: Measured) -> DatasetPlan:
        train, name = self.recipe.train, work.name
        validation, schedule = self.recipe.validation, self.mixing.schedule
        own = self.model.parameters_by_datasets().get(frozenset({name}), [])
        return DatasetPlan(
            grid=work.grid,
            windows=work.source.windows,
            share=schedule.shares[name],
            draws=draws,
            passes=draws * schedule.batch / work.source.windows,
            own_parameters=sum(parameter.numel() for parameter in own) if len(self.model.specs) > 1 else 0,
            tokens=train.global_batch * self._mean(name, float) * work.grid[0] * work.grid[1] / PATCH,
            flops=train.global_batch
            * self.forward[name]
            * self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune)),
            read_bytes=train.global_batch * work.window_bytes,
            activation_bytes=self.micro_batch * self._held(name),
            seconds=time.seconds,
            extrapolated=time.extrapolated,
            validation_calls=validation.windows + validation.rollouts * (work.frames - 1) if validation.every else 0,
            forward_flops=self.forward[name],
            exchange_seconds=time.exchange,
        )


def local_memory_bytes() -> float:
    """Memory of this machine's GPU, or on a CPU what is available."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(psutil.virtual_memory().available)


def local_bf16(recipe: Recipe) -> bool:
    """Whether products are bf16 on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return autocast_dtype(recipe.train.precision, device) is not None


def _validations(recipe: Recipe) -> int:
    """How many validations the run has: every so many steps, and at the end of a run that is longer."""
    every, steps = recipe.validation.every, recipe.train.steps
    return steps // every + (steps > every and steps % every > 0) if every else 0


def _checkpoints(recipe: Recipe) -> int:
    """How many checkpoints are on disk at the end."""
    settings, steps = recipe.checkpoint, recipe.train.steps
    saved = {*range(settings.every, steps + 1, settings.every), steps}
    newest = sorted(saved)[-settings.keep :]
    return len({*newest, *(step for step in saved if settings.keep_every and step % settings.keep_every == 0)})
