"""Checkpoints of a training: its whole state on the disk, so that it goes on to the same bits.

Enters: a policy, its optimizer and schedule, a JSON record. Leaves: folders that are complete or
not called checkpoints. To be changed here: what is saved, how it is written, what is kept.

    save   store ─► snapshot, a copy of state ─► writer, a folder ─► folders, what stays
    load   folders: the newest whole one ─► manifest, its files ─► load ─► restore, into what trains
"""
