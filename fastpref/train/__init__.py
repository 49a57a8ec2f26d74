"""Training: one loop, and the run folder it fills.

Input: a validated config. Output: a run folder with metrics, curves and the trained model. Change
here: what happens between two steps. Losses, data sources and model families are added elsewhere.
"""
