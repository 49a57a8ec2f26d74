"""Training: one loop, and what a run leaves behind.

Enters: a checked config. Leaves: a run folder with metrics, curves and the trained model. To be
changed here: what happens between two steps. A loss, a data source or a model family never is.
"""
