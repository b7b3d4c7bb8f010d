"""Dataset specifications made by hand, with the real channels of the eight datasets."""

import torch

from fm.model.spec import DatasetSpec
from fm.model.wavelit import WaveLiTFM

STATE_CHANNELS = {
    "active_matter": "concentration velocity_x velocity_y D_xx D_xy D_yx D_yy E_xx E_xy E_yx E_yy",
    "gray_scott_reaction_diffusion": "A B",
    "rayleigh_benard": "buoyancy pressure velocity_x velocity_y",
    "shear_flow": "tracer pressure velocity_x velocity_y",
    "turbulent_radiative_layer_2D": "density pressure velocity_x velocity_y",
    "viscoelastic_instability": "pressure c_zz velocity_x velocity_y C_xx C_xy C_yx C_yy",
    "acoustic_scattering_maze": "pressure velocity_x velocity_y",
    "helmholtz_staircase": "pressure_re pressure_im",
}
CONSTANT_CHANNELS = {"acoustic_scattering_maze": "density speed_of_sound", "helmholtz_staircase": "mask"}
PERIODIC, WALL, OPEN = ("PERIODIC", "PERIODIC"), ("WALL", "WALL"), ("OPEN", "OPEN")
BOUNDARIES = {
    "rayleigh_benard": (PERIODIC, WALL),
    "turbulent_radiative_layer_2D": (PERIODIC, OPEN),
    "viscoelastic_instability": (PERIODIC, WALL),
    "acoustic_scattering_maze": (("WALL", "OPEN"), ("WALL", "OPEN")),
    "helmholtz_staircase": (OPEN, OPEN),
}


def make_spec(name: str) -> DatasetSpec:
    """Made-up moments that differ from channel to channel."""
    state, constant = STATE_CHANNELS[name].split(), CONSTANT_CHANNELS.get(name, "").split()
    stats: dict[str, dict[str, float]] = {key: {} for key in ("mean", "std", "mean_delta", "std_delta")}
    for i, channel in enumerate([*state, *constant]):
        values = {"mean": 0.5 * i - 1, "std": 0.3 + i, "mean_delta": 0.01 * i, "std_delta": (0.3 + i) * 0.2}
        for key, value in values.items():
            stats[key][channel] = value
    return DatasetSpec(name, tuple(state), tuple(constant), BOUNDARIES.get(name, (PERIODIC, PERIODIC)), stats)


def make_inputs(
    spec: DatasetSpec, height: int = 18, width: int = 22, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random normalised state and constants."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(batch, len(spec.state_channels), height, width, generator=generator)
    return state, torch.randn(batch, len(spec.constant_channels), height, width, generator=generator)


def stir(model: WaveLiTFM) -> WaveLiTFM:
    """Random numbers added to every parameter (heads start at zero), from generators that know only the name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
