"""Low-rank adapters: peft's folders, where they go in a model, their arithmetic, 4 bits below them.

No reference here: that a policy is an adapter, `model/own_reference.py` and `model/pair.py` know.
"""
