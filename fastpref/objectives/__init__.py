"""Objectives: from token scores to one loss per pair.

Input: a loss config, a policy and, if the loss needs one, a reference. Output: a `StepLoss`, the
loop's only interface to a loss. Change here: losses (formulas are in `fastpref.losses`) and their
metrics.
"""
