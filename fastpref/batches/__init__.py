"""Batches: from encoded rows to what a rank computes in an optimizer step.

Enters: a `PreferenceSplit`. Leaves: `StepBatches`, made ahead of the loop. To be changed here:
the order of the data, how a step is divided among micro-batches and ranks, how rows lie in a
batch. All of it is a pure function of (seed, epoch, step), the number of ranks and the budget
of tokens.
"""
