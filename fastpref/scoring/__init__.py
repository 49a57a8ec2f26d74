"""Scoring: a frozen model's log-probabilities of rows, on the disk.

Enters: encoded rows and a model. Leaves: shards named by a key of all that they depend on, or rows
found by their tokens, so that what was interrupted goes on. To be changed here: what is kept, how
it is divided.
"""
