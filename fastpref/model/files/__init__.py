"""Checkpoints on disk or the hub: resolving names, reading configs, finding and loading weights.

The lowest layer of the room: nothing here knows of a scorer.
"""
