"""Shards behind a URL, read ahead of the schedule: the byte ranges of windows (ranges.py), or whole shards (blocks.py).

The loader announces the windows of the draws to come; threads fetch what they need while earlier batches are used.
Which windows come when is the schedule's business alone: how, and how fast, bytes arrive changes no batch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFolder, Retries
from data_pipeline.windows.blocks import ShardFetcher, WholeShards
from data_pipeline.windows.cache import BlobCache
from data_pipeline.windows.fetching import RemoteShards
from data_pipeline.windows.ranges import RangeFetcher, Ranges


@dataclass(frozen=True)
class StreamSettings:
    """How shards behind a URL are read."""

    shuffle: str = "global"  # the schedule's; global: ranges, blocks: whole shards
    shards_per_block: int = 4  # the schedule's, for blocks
    cache: Path | None = None  # folder; None: default_cache()
    cache_bytes: int = 40 * 10**9  # limit; 0: none, for global only
    draws_ahead: int = 64  # draws whose windows are fetched before they are asked for
    retries: Retries = field(default_factory=Retries)


def default_cache() -> Path:
    """$XDG_CACHE_HOME/wavelit, where the variable's default is ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wavelit"


def open_sources(
    root: RemoteFolder, datasets: Sequence[str], split: str, settings: StreamSettings
) -> Mapping[str, RemoteShards]:
    """The sources of some datasets under `root`, by name; they share threads, memory and the cache.

    Raises UserError if a manifest is missing or damaged, or if the cache cannot hold a block of shards of each dataset.
    """
    cache = BlobCache(settings.cache or default_cache(), settings.cache_bytes)
    folders = {name: root / name / split for name in datasets}
    if settings.shuffle == "global":
        ranges = RangeFetcher(cache if settings.cache_bytes else None)
        return {name: Ranges(folder, ranges, settings.draws_ahead) for name, folder in folders.items()}
    shards = ShardFetcher(cache, num_maps=2 * settings.shards_per_block * len(folders))
    sources = {name: WholeShards(folder, shards, settings.draws_ahead) for name, folder in folders.items()}
    _check_room(sources, cache, settings.shards_per_block)
    return sources


def _check_room(sources: Mapping[str, RemoteShards], cache: BlobCache, shards_per_block: int) -> None:
    """Raises UserError unless the cache can hold the largest block of each dataset at once."""
    needed = {}
    for name, source in sources.items():
        largest = sorted((shard.bytes for shard in source.manifest.shards), reverse=True)
        needed[name] = sum(largest[:shards_per_block])
    total = sum(needed.values())
    if total > cache.limit_bytes:
        each = ", ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in needed.items())
        raise UserError(
            f"{cache.folder}: the cache may hold {cache.limit_bytes / 1e9:.3g} GB, but one block of {shards_per_block} "
            f"shards of each dataset has {total / 1e9:.3g} GB ({each}): raise data.cache_gb (twice that has room for "
            "the next blocks), lower sampling.shards_per_block, or leave datasets out"
        )
