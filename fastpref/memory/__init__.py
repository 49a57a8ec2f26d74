"""Memory: estimate of a run's device memory, and micro-batch sizes that fit.

Input: a model's shape, the options, a device. Output: a `MemoryPlan`, and micro-batches that fit.
Change here: the accounting of memory. Nothing here changes a run's results beyond rounding.
"""
