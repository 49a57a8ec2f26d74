"""Training checkpoints: the whole state on disk, so that a resumed run ends with the same bits.

Enters: a policy, its optimizer and schedule, a JSON record. Leaves: folders that are complete or
not named like checkpoints. To be changed here: what is saved, how it is written, what is kept.

    save   store ─► snapshot (copy of the state) ─► writer (a folder) ─► folders (retention)
    load   folders (newest complete one) ─► manifest (its files) ─► load ─► restore (into the run)
"""
