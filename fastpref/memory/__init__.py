"""Memory: estimate of a run's device memory, and micro-batch sizes that fit.

Enters: a model's shape, the options, a device. Leaves: a `MemoryPlan`, and micro-batches that fit.
To be changed here: the accounting of memory. Nothing here changes results beyond rounding.
"""
