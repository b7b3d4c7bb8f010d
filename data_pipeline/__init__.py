"""From simulation files to batches: mini-Well, registry, shards, schedule, readers.

`write_well` writes arrays in the Well's layout; `data-pipeline register` and `data-pipeline shard` go on from there.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.well.from_arrays import write_well

__version__ = "0.1.0"
__all__ = ["write_well"]


def __getattr__(name: str) -> Any:
    """Import `write_well` when it is used first (PEP 562), so that `data-pipeline --help` answers at once."""
    if name == "write_well":
        from data_pipeline.well.from_arrays import write_well

        return write_well
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
