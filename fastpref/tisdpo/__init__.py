"""TIS-DPO: token weights from two models, and all its stages in one run.

Enters: a config with `task=estimate_weights` or `task=tisdpo`. Leaves: a weights file with its
report, a trained policy. To be changed here: the recipe, and how scores become weights.
"""
