"""Attention over packed rows, by whichever library computes it correctly here.

Enters: a segment layout. Leaves: one `PackedAttention`, chosen by trying. To be changed here: a
back end, what is asked of it.
"""
