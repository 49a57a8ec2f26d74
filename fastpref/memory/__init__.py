"""Memory: what a run takes of a device, and how much of a step is computed at once.

Enters: a model's shape, the options, a device. Leaves: a `MemoryPlan`, and micro-batches that fit.
To be changed here: what takes memory. Nothing here changes a number of a run beyond rounding.
"""
