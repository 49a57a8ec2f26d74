"""Checkpoints as they lie: what a name means, on the disk or the hub, and which weights are there.

Below all else of the room: nothing here knows a scorer.
"""
