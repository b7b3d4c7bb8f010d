"""What the steps of a workload compute, move and keep, counted once for each precision and scaled to a batch."""

from dataclasses import replace

import torch
from tqdm import tqdm

from fm.benchmark.ceilings import Ceilings
from fm.benchmark.floor import floor
from fm.benchmark.result import Work
from fm.cost import Footprint, footprint
from fm.planning.workload import Workload
from fm.settings import Recipe
from fm.unroll import Unroll


class Counts:
    """Footprints of the workload's steps by dataset; each is that of `windows` windows."""

    def __init__(self, workload: Workload, precisions: set[torch.dtype | None]) -> None:
        """`precisions` are what products are cast to, None is float32. Shows a progress bar."""
        recipe = workload.recipe
        model = workload.fake_model()
        self.parameters = model.num_parameters()
        self.windows = recipe.train.global_batch
        self._workload = workload
        self._found: dict[tuple[str, torch.dtype | None], Footprint] = {}
        everything = [(work, dtype) for dtype in sorted(precisions, key=str) for work in workload.datasets.values()]
        for work, dtype in tqdm(everything, desc="count", unit="dataset", leave=False):
            objective = Unroll(model, recipe.loss, recipe.finetune, dtype)
            calls = recipe.window_length(work.name) - 1
            self._found[work.name, dtype] = footprint(objective, work.name, work.grid, self.windows, calls)

    def work(self, dataset: str, dtype: torch.dtype | None, recipe: Recipe, ceilings: Ceilings) -> Work:
        """A dataset's step with the windows of `recipe`, a variant of the workload's."""
        one, windows = self._found[dataset, dtype], recipe.train.global_batch
        times = windows / self.windows
        products = [replace(it, flops=int(it.flops * times), bytes=int(it.bytes * times)) for it in one.products]
        calls = recipe.window_length(dataset) - 1
        return Work(
            windows=windows,
            tokens=windows * calls * self._workload.datasets[dataset].source.tokens,
            flops=sum(product.flops for product in products),
            moved_bytes=one.moved_bytes * times,
            floor=floor(products, self.parameters, ceilings),
        )
