"""Scoring: per-token log-probabilities of rows under a frozen model, stored on disk.

Enters: encoded rows and a model. Leaves: shards under a key that digests all they depend on, or
rows cached by a digest of their tokens, so an interrupted run resumes. To be changed here: what is
stored, and how it is split into files.
"""
