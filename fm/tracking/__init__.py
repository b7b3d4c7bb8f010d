"""What a run writes while it trains: logs, run.json, TensorBoard, other trackers. Main process only."""
