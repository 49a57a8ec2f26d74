"""Models: from a name to something that scores tokens.

Enters: a folder, a hub id, an archive or an adapter. Leaves: a `TokenScorer`, sharded, on its
device, checked against the model's own logits. To be changed here: where models come from, what
is held to be right about a family, how parameters are spread. No losses.
"""
