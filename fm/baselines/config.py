"""What defines a baseline: its name and sizes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fm.model_config import check_keys
from fm.nn.dwt import WAVELETS

# Name -> sizes and their defaults. Those of the_well's models are arguments of its classes, with its values; where it
# has none (modes1, modes2), those of its benchmark.
SIZES: dict[str, dict[str, int]] = {
    "unet_convnext": {"stages": 4, "blocks_per_stage": 1, "blocks_at_neck": 1, "init_features": 32},
    "unet_classic": {"init_features": 32},
    "fno": {"modes1": 16, "modes2": 16, "hidden_channels": 64},
    "tfno": {"modes1": 16, "modes2": 16, "hidden_channels": 64},
    "avit": {"hidden_dim": 768, "num_heads": 12, "processor_blocks": 8},
    "wno": {"width": 64, "depth": 4, "levels": 4},
}
AVIT_GROUPS = 12  # of the_well's group norms in the patch embedding, over hidden_dim / 4 channels


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline by name; what it is trained towards is what WaveLiT is."""

    name: str  # unet_convnext, unet_classic, fno, tfno, avit or wno
    sizes: Mapping[str, int] = field(default_factory=dict)  # those that differ from SIZES; resolved, all of them
    wavelet: str = "bior2.2"  # of the loss: haar, bior2.2 or bior4.4
    predict: str = "delta"  # delta (the change, in units of its own std) or state (the next frame)

    def __post_init__(self) -> None:
        choices = {"name": tuple(SIZES), "wavelet": tuple(WAVELETS), "predict": ("delta", "state")}
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f"baseline.{key} must be one of {', '.join(valid)}, got {getattr(self, key)!r}")
        for key, value in self.sizes.items():
            if key not in SIZES[self.name]:
                known = ", ".join(SIZES[self.name])
                raise ValueError(f"baseline.sizes: {self.name} has the sizes {known}, got {key!r}")
            if value < 1:
                raise ValueError(f"baseline.sizes.{key} must be at least 1, got {value}")
        sizes = {**SIZES[self.name], **self.sizes}
        if self.name == "avit":
            width, heads = sizes["hidden_dim"], sizes["num_heads"]
            if width % (4 * AVIT_GROUPS) or width % heads:
                raise ValueError(
                    f"baseline.sizes.hidden_dim of avit must be a multiple of {4 * AVIT_GROUPS} and of num_heads, got "
                    f"{width} with {heads} heads"
                )
        object.__setattr__(self, "sizes", sizes)  # so that files say all of them

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "BaselineConfig":
        """Inverse of `to_json`. ValueError, naming `where`, for unknown or missing keys."""
        check_keys(f"config of {where}", value, (f.name for f in fields(cls)))
        return cls(**value)
