"""The dataset of a trained model that an added dataset starts from.

An added dataset has a task vector and a head of its own. Drawn ones first have to be learned, and they hold a trained
trunk back (tests/benchmarks/RESULTS.md). So they are copied from the donor: the dataset of the model whose head
predicts windows of the added dataset best. The last layer of the head stays zero, so the untrained model predicts
persistence or the mean.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from data_pipeline.windows.reader import Batch, ShardReader
from fm.model.spec import DatasetSpec
from fm.model.surrogate import ChannelMoments
from fm.model.wavelit import WaveLiTFM

NUM_WINDOWS = 4  # of the added dataset, evenly spaced, that the heads predict


def start_from_donors(
    extended: WaveLiTFM, added: Mapping[str, ShardReader], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Copy the features of each added dataset from its donor; return the donors by dataset, of those that have one.

    `added` are the readers of the train split. `aliases` gives, for channels that the model had not seen, the known
    channels that stand for them. A dataset has no donor if no head predicts it better than zeros do.
    """
    donors = {}
    for name, reader in added.items():
        if count := len(reader.index(extended.context + 1)):
            windows = np.unique(np.linspace(0, count - 1, NUM_WINDOWS).astype(np.int64))
            errors = head_errors(extended, name, reader.batch(windows, extended.context + 1), aliases)
            best = min(sorted(errors), key=lambda donor: errors[donor], default=None)
            if best is not None and errors[best] < 1:
                donors[name] = best
    weights = extended.state_dict()
    for name, donor in donors.items():
        weights |= copied_features(extended, name, donor, aliases)
    extended.load_state_dict(weights)
    return donors


@torch.no_grad()
def head_errors(extended: WaveLiTFM, name: str, batch: Batch, aliases: Mapping[str, str]) -> dict[str, float]:
    """Return the errors of other datasets' heads on windows of the dataset `name`, 1 for the output zero.

    A head reads the channels that both datasets have, and zeros for all others. The error is the root mean square over
    that of the target, the mean over the channels of `name`; channels that a head does not predict count as zero.
    """
    spec, context = extended.specs[name], extended.context
    frames, constants = extended.normalize(batch.fields, name), extended.normalize_constants(batch.constants, name)
    fields = extended.inputs(frames[:, :-1], constants, name).unbind(1)
    inputs = {_known(one, aliases): field for one, field in zip(spec.inputs(context), fields, strict=True)}
    target = frames[:, -1]  # (B, C, H, W)
    if extended.delta[name]:
        moments = cast(ChannelMoments, extended.moments[name])
        target = (target - frames[:, -2] - moments.delta_shift) / moments.delta_scale
    errors = {}
    for donor in extended.specs.values():
        if donor.name == name or extended.delta[donor.name] != extended.delta[name]:
            continue
        nothing = torch.zeros_like(fields[0])
        given = torch.stack([inputs.get(one, nothing) for one in donor.inputs(context)], dim=1)
        # The output depends on the donor's axes, and here they are those of the data. It depends on no constraint.
        output = extended.output(given, replace(donor, boundary=spec.boundary, conserved=(), ranges={})).unbind(1)
        known = dict(zip(donor.state_channels, output, strict=True))
        predicted = torch.stack([known.get(_known(one, aliases), nothing) for one in spec.state_channels], dim=1)
        squares = [one.double().square().mean(dim=(0, 2, 3)) for one in (predicted - target, target)]
        errors[donor.name] = float((squares[0] / squares[1].clamp_min(1e-30)).sqrt().mean())
    return errors


def copied_features(extended: WaveLiTFM, name: str, donor: str, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the task vector and, of a head that convolves, all but its last layer, as the donor has them.

    The weights of inputs that the donor does not have stay as they are.
    """
    weights, head, source = extended.state_dict(), f"heads.{name}.", f"heads.{donor}."
    copied = {f"task_vectors.{name}": weights[f"task_vectors.{donor}"]}
    if extended.config.decoder != "conv":
        return copied
    copied |= {f"{head}{part}": weights[f"{source}{part}"] for part in ("linear.weight", "linear.bias", "decoder.bias")}
    own, theirs = (_inputs(extended.specs[one], extended.context, aliases) for one in (name, donor))
    mix, old = weights[f"{head}decoder.mix"].clone(), weights[f"{source}decoder.mix"]  # (F, inputs + F, 3, 3)
    mix[:, len(own) :] = old[:, len(theirs) :]
    for place, channel in enumerate(own):
        if channel in theirs:
            mix[:, place] = old[:, theirs.index(channel)]
    return copied | {f"{head}decoder.mix": mix}


def _inputs(spec: DatasetSpec, context: int, aliases: Mapping[str, str]) -> list[str]:
    return [_known(name, aliases) for name in spec.inputs(context)]


def _known(channel: str, aliases: Mapping[str, str]) -> str:
    """Return the known channel that stands for an input, which may have the suffix of an earlier frame."""
    name, at, lag = channel.partition("@")
    return f"{aliases.get(name, name)}{at}{lag}"
