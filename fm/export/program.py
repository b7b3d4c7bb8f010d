"""One step of a model as a program that runs wherever torch does, without this package (torch.export)."""

import copy
import io

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from fm.surrogate import Surrogate


class Step(nn.Module):
    """One dataset's step in physical units: state (B, C, H, W) and constants (B, K, H, W) to the next state."""

    def __init__(self, model: Surrogate, dataset: str) -> None:
        super().__init__()
        self.model, self.dataset = model, dataset

    def forward(self, state: Tensor, constants: Tensor) -> Tensor:
        model, dataset = self.model, self.dataset
        normalised = model.normalise(state, dataset), model.normalise_constants(constants, dataset)
        return model.denormalise(model(*normalised, dataset), dataset)


def step_program(model: Surrogate, dataset: str) -> bytes:
    """The program of a dataset as a .pt2 file, for any batch size B and the grid of the training data.

    UserError for a dataset that the model does not know, or whose grid is not known.
    """
    if dataset not in model.specs:
        raise UserError(f"--program: expected a dataset of the model, {', '.join(model.specs)}; got {dataset!r}")
    spec = model.specs[dataset]
    if spec.grid is None:
        raise UserError(f"--program {dataset}: the model does not know the grid of its training data; train it again")
    state = spec.moment("mean", spec.state_channels).float().expand(2, -1, *spec.grid).contiguous()
    constants = torch.zeros(2, len(spec.constant_channels), *spec.grid)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        step = Step(copy.deepcopy(model), dataset).eval().requires_grad_(False)
        program = torch.export.export(step, (state, constants), dynamic_shapes=({0: batch}, {0: batch}))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()
