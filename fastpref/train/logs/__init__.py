"""A run's output: metrics for files, trackers and the console, advice, and the closing table."""
