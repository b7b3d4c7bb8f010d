"""Learning datasets that a pretrained model did not know, without forgetting the others (the recipe's section `adapt`).

A parameter belongs to a part of the model: embedding (lifting rows, task vectors), trunk or head. It is a new dataset's
own if no other dataset of the run uses it and it is not of the trunk. At the beginning only the new datasets are drawn
and only their own parameters move; then all do, each part at its rate, and the other datasets are replayed. All of it
is a function of the step, so a run that continues has the same.
"""

from collections.abc import Collection, Mapping

from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest
from data_pipeline.windows.schedule import Schedule
from fm.optim import ParameterGroup
from fm.settings import AdaptSettings
from fm.surrogate import Surrogate

PARTS = ("embedding", "trunk", "head")


def part_of(parameter: str) -> str:
    """The part of the model, one of PARTS, that the named parameter belongs to; a baseline is all trunk."""
    return {"lifting": "embedding", "task_vectors": "embedding", "heads": "head"}.get(parameter.split(".")[0], "trunk")


def parameter_groups(model: Surrogate, adapt: AdaptSettings | None) -> list[ParameterGroup]:
    """The optimiser's groups: parameters that the same datasets use and, where the recipe adapts, of the same part.

    UserError where new datasets are to learn alone and have no part of their own that may move.
    """
    by_datasets = model.parameters_by_datasets()
    if adapt is None:
        return [ParameterGroup(parameters, datasets) for datasets, parameters in by_datasets.items()]
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for datasets, parameters in by_datasets.items():
        for part in PARTS:
            mine: list[nn.Parameter] = [one for one in parameters if parts[id(one)] == part]
            if mine:
                own = part != "trunk" and datasets <= set(adapt.datasets)
                groups.append(ParameterGroup(mine, datasets, getattr(adapt.rates, part), moves_alone=own))
    if adapt.alone_steps and not any(group.moves_alone and group.rate for group in groups):
        raise UserError(
            f"adapt.alone_steps: nothing would move in them, {', '.join(adapt.datasets)} has no part of its own with a "
            "rate above 0. Own parts are of embedding and head (adapt.rates); a baseline has none"
        )
    return groups


def learns_alone(adapt: AdaptSettings | None, step: int) -> bool:
    """Whether only the new datasets' own parameters move in the step after `step` steps."""
    return adapt is not None and step < adapt.alone_steps


def rates_after(adapt: AdaptSettings, step: int) -> dict[str, float]:
    """Factors on the learning rate in the step after `step` steps, by part; those of own parameters as own_<part>."""
    alone = learns_alone(adapt, step)
    rates = {part: 0.0 if alone else getattr(adapt.rates, part) for part in PARTS}
    own = ("embedding", "head") if adapt.datasets else ()
    return rates | {f"own_{part}": getattr(adapt.rates, part) for part in own}


def check_adapted(adapt: AdaptSettings | None, datasets: Collection[str]) -> None:
    """UserError unless the datasets of the run are those that the settings speak of."""
    for name in adapt.datasets if adapt else ():
        if name not in datasets:
            raise UserError(f"adapt.datasets: no dataset {name!r} in this run. {nearest(name, sorted(datasets))}")
    if adapt is not None and adapt.share is not None and set(datasets) <= set(adapt.datasets):
        raise UserError(
            "adapt.share: expected datasets beside the new ones to divide the other draws among, got "
            f"{', '.join(sorted(datasets))} alone; name more in data.datasets, or set adapt.share=null"
        )


def adapted(schedule: Schedule, adapt: AdaptSettings | None, draws: int) -> Schedule:
    """A schedule of one segment with the segments that the settings ask for; a step has `draws` draws.

    UserError where the schedule gives the new datasets no share.
    """
    if adapt is None or (not adapt.alone_steps and adapt.share is None):
        return schedule
    shares = schedule.shares
    fresh = {name: share for name, share in shares.items() if name in adapt.datasets}
    others = {name: share for name, share in shares.items() if name not in adapt.datasets}
    if not sum(fresh.values()):
        raise UserError(f"adapt: sampling.weights gives {', '.join(fresh)} no share; expected a weight above 0")
    if adapt.share is not None:
        if not sum(others.values()):
            raise UserError("adapt.share: sampling.weights leaves the other datasets no share; set adapt.share=null")
        shares = _scaled(fresh, adapt.share) | _scaled(others, 1 - adapt.share)
    if not adapt.alone_steps:
        return schedule.with_shares(0, shares)
    alone = _scaled(fresh, 1.0) | dict.fromkeys(others, 0.0)
    return schedule.with_shares(0, alone).with_shares(adapt.alone_steps * draws, shares)


def _scaled(shares: Mapping[str, float], total: float) -> dict[str, float]:
    """The shares in their proportions, with this sum."""
    return {name: total * share / sum(shares.values()) for name, share in shares.items()}
