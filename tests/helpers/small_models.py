"""Small models of datasets by name."""

from handmade import make_spec

from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM

SMALL = ModelConfig(width=16, depth=2, heads=2)
MIXED = ["acoustic_scattering_maze", "active_matter", "rayleigh_benard"]


def small_model(*names: str, config: ModelConfig = SMALL, seed: int = 0) -> WaveLiTFM:
    return WaveLiTFM(config, [make_spec(name) for name in names or MIXED], seed)
