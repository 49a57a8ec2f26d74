"""Objectives: from token scores to one loss a pair.

Enters: a loss config, a policy and perhaps a reference. Leaves: a `StepLoss`, all that the loop
knows of a loss. To be changed here: a loss (its formula stands in `fastpref.losses`), its
metrics.
"""
