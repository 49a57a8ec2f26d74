"""Low-rank adapters: peft's folders, target layers, their arithmetic, and 4-bit base layers.

`model/own_reference.py` and `model/pair.py` make a policy and its reference of a model with them.
"""
