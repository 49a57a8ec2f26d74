"""Training: one loop, and the run folder it fills.

Enters: a validated config. Leaves: a run folder with metrics, curves and the trained model. To be
changed here: what happens between two steps. Losses, data sources and model families are elsewhere.
"""
