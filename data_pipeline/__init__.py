"""From simulation files to batches: mini-Well, registry, shards, schedule, readers."""

__version__ = "0.1.0"
