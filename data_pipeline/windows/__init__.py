"""From shards to batches: which windows, when, from where."""
