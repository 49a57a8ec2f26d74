"""Report on the data before training: counts, length histograms, rows token by token.

The top layer of `data`: the rest of `data` does not import it.
"""
