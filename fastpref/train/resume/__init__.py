"""Resuming a run: finding its checkpoint, and checking that it belongs to the same run."""
