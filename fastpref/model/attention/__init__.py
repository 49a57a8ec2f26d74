"""Attention over packed rows, by whichever library computes it correctly here.

Enters: a segment layout. Leaves: one `PackedAttention`, chosen by a numerical check. To be changed
here: backends, and how they are checked.
"""
