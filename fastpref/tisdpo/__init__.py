"""TIS-DPO: token weights from two models, and all its stages in one run.

Input: a config with `task=estimate_weights` or `task=tisdpo`. Output: a weights file with its
report, a trained policy. Change here: the recipe, and how scores become weights.
"""
