"""The_well's benchmark models, imported one by one.

The package that holds them imports all eight when it is imported, and with them timm and torchvision (which must be
built for exactly this torch), wandb and torch_harmonics. The five models taken here need nothing of these: timm's
DropPath at rates above 0 only, wandb for plots, torch_harmonics on spheres. So while a model's file is imported, its
package and neuralop are there without having been run, and the packages it does not use are empty.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from data_pipeline.errors import UserError

MODELS = "the_well.benchmark.models"
INSTALL = "run ./launch/setup baselines (or pip install 'wavelit-fm[baselines]')"
# Module -> what is imported from it and never used.
UNUSED = {
    "timm": (),
    "timm.layers": ("DropPath",),
    "timm.models": (),
    "timm.models.layers": ("DropPath",),
    "torch_harmonics": ("RealSHT", "InverseRealSHT"),
    "wandb": (),
}


def upstream_class(module: str, name: str) -> type:
    """The class `name` of the_well's model `module`. UserError if what it needs is not installed."""
    try:
        with _alone():
            return getattr(importlib.import_module(f"{MODELS}.{module}"), name)
    except ImportError as error:
        raise UserError(f"the baseline {module} needs packages that are not installed ({error}): {INSTALL}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Within it, imports find stand-ins for the packages above; after it, what was there before."""
    stand_ins = {name: _empty(name, unused) for name, unused in UNUSED.items()}
    for package in (MODELS, "neuralop"):
        spec = find_spec(package)
        if spec is not None:
            stand_ins[package] = module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _empty(name: str, unused: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    for attribute in unused:
        setattr(module, attribute, None)
    return module
