"""Objectives: from token scores to one loss per pair.

Enters: a loss config, a policy and, if the loss needs one, a reference. Leaves: a `StepLoss`, the
loop's only interface to a loss. To be changed here: losses (formulas are in `fastpref.losses`) and
their metrics.
"""
