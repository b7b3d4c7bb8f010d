"""Which way a model is spread over processes, as the launch configuration asks."""

from accelerate import Accelerator

from data_pipeline.errors import UserError
from fm.adapt import parameter_groups
from fm.optim import GroupedAdamW
from fm.parallel.base import Parallel
from fm.parallel.fully_sharded import FullySharded
from fm.parallel.replicated import Replicated
from fm.parallel.zero import Zero
from fm.runtime import asked_for, fsdp_reshards
from fm.settings import AdaptSettings, TrainSettings
from fm.unroll import Unroll


def spread(
    accelerator: Accelerator, objective: Unroll, settings: TrainSettings, adapt: AdaptSettings | None = None
) -> Parallel:
    """The objective, on its device, and a new optimiser, spread over the processes. Collective.

    UserError where the model's own code does not allow what the launch configuration asks for.
    """
    if not len(objective.model.blocks) and (asked_for("FSDP") or asked_for("DEEPSPEED")):
        raise UserError(
            "baselines train in one process or under DDP (launch/ddp.yaml, launch/cpu2.yaml): their networks cannot be "
            "sharded; the launch configuration asks for FSDP or DeepSpeed"
        )
    if asked_for("FSDP"):
        reshard = fsdp_reshards()
        if accelerator.num_processes > 1:
            return FullySharded(accelerator, objective, settings, adapt, reshard)
        accelerator.print("FSDP has nothing to spread over one process; it trains as without.")
    optimizer = GroupedAdamW(parameter_groups(objective.model, adapt), settings)
    if asked_for("DEEPSPEED"):
        return Zero(accelerator, objective, optimizer)
    return Replicated(accelerator, objective, optimizer)
