"""Batches: from encoded rows to the micro-batches of each rank and optimizer step.

Enters: a `PreferenceSplit`. Leaves: `StepBatches`, prefetched for the loop. To be changed here:
the order of the data, how a step is divided among micro-batches and ranks, and the layout of rows
in a batch. All of it is a pure function of (seed, epoch, step), the number of ranks and the token
limit.
"""
