"""Models: from a name to a module that scores tokens.

Enters: a folder, a hub id, an archive or an adapter. Leaves: a `TokenScorer`, sharded, on its
device, checked against the model's own logits. To be changed here: where models come from, which
checks a family has to pass, how parameters are sharded. No losses.
"""
