"""Low-rank adapters: peft's folders, target layers, their arithmetic, and 4-bit base layers.

No reference here: `model/pair.py` and `model/own_reference.py` make one of a policy with adapters.
"""
