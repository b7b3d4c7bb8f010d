"""Ways to take the same step: each a short list of recipe overrides."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import UserError
from data_pipeline.strict_yaml import nearest

NONE = "none"


@dataclass(frozen=True)
class Variant:
    """One way, and on which devices it is measured unless --variants says otherwise."""

    name: str
    overrides: tuple[str, ...]
    default_on: tuple[str, ...] = ("cuda",)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("float32", ("train.precision=float32", "train.compile=eager"), default_on=("cpu", "cuda")),
        Variant("bf16", ("train.precision=bf16", "train.compile=eager"), default_on=("cpu", "cuda")),
        Variant("blocks", ("train.precision=bf16", "train.compile=blocks")),
        Variant("step", ("train.precision=bf16", "train.compile=step")),
        Variant("graphs", ("train.precision=bf16", "train.compile=graphs")),
        Variant("batch4", ("train.global_batch=4",), default_on=()),
        Variant("batch8", ("train.global_batch=8",), default_on=("cpu", "cuda")),
        Variant("batch16", ("train.global_batch=16",)),
    )
}


def chosen_variants(names: Sequence[str] | None, device: str) -> list[Variant]:
    """The named variants, or those that are measured on this device by default; the one name `none` is no variant.

    UserError, with the nearest, for another name.
    """
    if names and list(names) == [NONE]:
        return []
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"--variants: no variant {name!r}. {nearest(name, [*VARIANTS, NONE])}")
    return [one for one in VARIANTS.values() if (one.name in names if names else device in one.default_on)]
