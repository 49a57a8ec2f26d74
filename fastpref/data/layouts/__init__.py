"""Rows as people have them, brought to the one form that is trained on and held to its rules.

Below all else of the room: nothing here knows where rows lie, or a tokenizer.
"""
